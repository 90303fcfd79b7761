"""An evaluation from adapters to records: what is measured, what is not measured twice, what is added up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from tests import tiny_llama
from tests.evaluation.tiny_chat import write_chat_model, write_task
from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation import evaluate
from vllm_jdlora.evaluation.evaluate import Evaluation, read_tasks
from vllm_jdlora.evaluation.model import SwitchableModel
from vllm_jdlora.evaluation.records import RecordFile
from vllm_jdlora.evaluation.text_metrics import rouge_l
from vllm_jdlora.evaluation.variant import Variant, uncompressed

LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_chat_model(root / "model")
    for name, seed in (("one", 1), ("two", 2)):
        tiny_llama.write_adapter(root / "adapters" / name, seed)
        write_task(root / "tasks" / f"{name}.jsonl", seed, items=60)
    return root


@pytest.fixture(scope="module")
def adapters(folder):
    return read_adapters([folder / "adapters"])[0]


@pytest.fixture(scope="module")
def model(folder):
    return SwitchableModel.load(folder / "model")


@pytest.fixture
def evaluation(folder, adapters, model, tmp_path):
    tasks = read_tasks(folder / "tasks", adapters)
    return Evaluation(model, adapters, tasks, RecordFile(tmp_path / "r.jsonl"), max_new_tokens=LIMIT)


def without_last_layer(adapters):
    """A lossy variant: the slices of the last layer dropped."""
    whole = uncompressed(adapters)
    return Variant(
        "lossy", 1000, lambda name: {k: v for k, v in whole.update(name).items() if not k.startswith("model.layers.1.")}
    )


@pytest.fixture
def scored(monkeypatch):
    """Counts what goes through the model."""
    calls = []
    score = evaluate.score
    monkeypatch.setattr(evaluate, "score", lambda *args, **kwargs: calls.append(args) or score(*args, **kwargs))
    return calls


def test_records_hold_means_of_their_items_and_agreement_with_both_references(evaluation, adapters):
    records = {(r.variant, r.adapter): r for r in evaluation.run([without_last_layer(adapters)])}
    assert [v for v, _ in records] == ["base", "uncompressed"] * 2 + ["lossy"] * 2
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for (_, name), record in records.items():
        items = evaluation.tasks[name].items
        own, plain = records["uncompressed", name], records["base", name]
        assert record.task == name and len(record.answers) == len(record.losses) == len(items) == 6
        assert record.loss == pytest.approx(
            np.average(record.losses, weights=record.tokens), rel=1e-5
        )  # stored to 1e-6
        assert record.token_accuracy == sum(record.correct) / sum(record.tokens)
        expected = [scorer.score(i.output, a)["rougeL"].fmeasure for i, a in zip(items, record.answers, strict=True)]
        assert record.rouge_l == pytest.approx(np.mean(expected), abs=1e-6)
        assert record.exact_match == np.mean([i.output == a for i, a in zip(items, record.answers, strict=True)])
        pairs = list(zip(record.answers, own.answers, plain.answers, strict=True))
        assert record.agreement == np.mean([a == b for a, b, _ in pairs])
        assert record.agreement_with_base == np.mean([a == c for a, _, c in pairs])
    assert records["uncompressed", "one"].agreement == 1 and records["uncompressed", "one"].relative_error == 0
    assert records["base", "one"].agreement < 1 and records["base", "one"].relative_error == pytest.approx(1)
    assert 0 < records["lossy", "one"].relative_error < 1 and records["lossy", "one"].bytes_per_adapter == 500


def test_a_second_run_measures_nothing_and_a_renamed_variant_neither(evaluation, adapters, folder, model, scored):
    first = list(evaluation.run([without_last_layer(adapters)]))
    assert len(scored) == 6
    again = Evaluation(model, adapters, evaluation.tasks, RecordFile(evaluation.results.path), max_new_tokens=LIMIT)
    lossy = without_last_layer(adapters)
    assert list(again.run([lossy])) == first
    renamed = list(again.run([Variant("other", 500, lossy.update)]))[-1]
    assert (renamed.variant, renamed.bytes, renamed.losses) == ("other", 500, first[-1].losses)
    assert len(scored) == 6
    assert len(RecordFile(evaluation.results.path).records) == 8
    more = Evaluation(model, adapters, evaluation.tasks, RecordFile(evaluation.results.path), max_new_tokens=LIMIT + 1)
    list(more.run([]))
    assert len(scored) == 10


def test_a_run_killed_while_it_wrote_goes_on_from_the_last_whole_record(evaluation, adapters, model, scored):
    whole = list(evaluation.run([]))
    file = evaluation.results.path
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    scored.clear()
    again = Evaluation(model, adapters, evaluation.tasks, RecordFile(file), max_new_tokens=LIMIT)
    assert list(again.run([])) == whole
    assert len(scored) == 2 and RecordFile(file).records == whole


def test_a_variant_that_changes_nothing_agrees_fully_and_one_without_update_is_the_base(evaluation, adapters, scored):
    same, nothing = uncompressed(adapters), Variant("zero", 10, lambda name: {})
    records = {(r.variant, r.adapter): r for r in evaluation.run([Variant("same", 7, same.update), nothing])}
    assert len(scored) == 4
    assert records["same", "one"].agreement == 1 and records["same", "one"].bytes == 7
    assert records["zero", "two"].agreement_with_base == 1
    assert records["zero", "two"].answers == records["base", "two"].answers


def test_loss_alone_decodes_nothing(evaluation, adapters):
    records = list(evaluation.run([without_last_layer(adapters)], answers=False))
    assert all(r.answers == [] and r.rouge_l is None and r.agreement is None for r in records)
    full = list(evaluation.run([without_last_layer(adapters)]))
    assert [r.loss for r in records] == [r.loss for r in full]


def test_two_runs_over_different_adapters_share_one_file(evaluation, adapters, folder, model):
    other = RecordFile(evaluation.results.path)
    halves = [
        Evaluation(model, adapters, {name: evaluation.tasks[name]}, results, max_new_tokens=LIMIT)
        for name, results in (("one", evaluation.results), ("two", other))
    ]
    for _ in zip(*(half.run([]) for half in halves), strict=True):
        pass
    assert sorted((r.variant, r.adapter) for r in RecordFile(evaluation.results.path).records) == [
        (variant, name) for variant in ("base", "uncompressed") for name in ("one", "two")
    ]


def test_a_file_of_something_else_is_refused(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"key": 1}\n')
    with pytest.raises(JDLoRAError, match=r"r.jsonl:1: not a record"):
        RecordFile(file)
    file.write_text("nonsense\n")
    with pytest.raises(JDLoRAError, match=r"r.jsonl:1: not a line of JSON"):
        RecordFile(file)


def test_rouge_l_by_hand():
    # Longest common subsequence 2 of 3 and 4 words: precision 2/4, recall 2/3, F = 4/7.
    assert rouge_l("the red cat", "the big red dog") == pytest.approx(4 / 7)
    assert rouge_l("running dogs", "run dog") == 1  # stems
    # The package sees no word in these.
    assert rouge_l("?", "?") == 1 and rouge_l("?", "!") == 0 and rouge_l("猫", "猫") == 1


def test_records_are_one_line_of_json_each(evaluation):
    list(evaluation.run([], answers=False))
    lines = evaluation.results.path.read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["variant"] in ("base", "uncompressed") for line in lines)
