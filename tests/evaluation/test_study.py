"""`jdlora study`: every part's figures against independent ones, and nothing measured or fitted twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from tests import tiny_llama
from tests.evaluation.tiny_chat import write_chat_model, write_task
from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation import evaluate
from vllm_jdlora.evaluation.distillation import DistillationSettings, Distiller
from vllm_jdlora.evaluation.evaluate import Evaluation, read_tasks
from vllm_jdlora.evaluation.model import SwitchableModel
from vllm_jdlora.evaluation.records import RecordFile
from vllm_jdlora.evaluation.study import baselines, study
from vllm_jdlora.evaluation.study.run import run_study
from vllm_jdlora.evaluation.study.settings import StudySettings
from vllm_jdlora.evaluation.variant import uncompressed
from vllm_jdlora.jd.problem import Factors
from vllm_jdlora.jd.published import jd_published

NAMES = ("a", "b", "c", "d")
# Of four adapters, at rank 4 (the least that budgets are tried with): 0.16 of their bytes and more.
BUDGETS = (Fraction(1, 4), Fraction(1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    write_chat_model(root / "model")
    for seed, name in enumerate(NAMES):
        tiny_llama.write_adapter(root / "adapters" / name, seed, targets=["q_proj", "v_proj"])
        write_task(root / "tasks" / f"{name}.jsonl", seed, items=20)
    (root / "text.txt").write_text("The cat sat on the mat.\n\nSeven dogs ran to Rome.\n\nAll is blue, or red.\n")
    for seed, name in enumerate(NAMES[:2], 7):
        tiny_llama.write_adapter(root / "long" / name, seed, targets=["q_proj", "v_proj"])
    return root


def settings(folder, output, *parts, **more):
    usual = {"budgets": BUDGETS, "limit": 2, "max_new_tokens": 6, "baselines": ("svd", "svd-activation-int8")}
    places = {"base_model": folder / "model", "adapters": [folder / "adapters"], "tasks": folder / "tasks"}
    places["calibration"] = folder / "text.txt"
    return StudySettings(output=output, parts=parts, **{**usual, **places, **more})


def command(folder, output, *more):
    places = ["--base-model", folder / "model", "--adapters", folder / "adapters", "--tasks", folder / "tasks"]
    places += ["--calibration", folder / "text.txt"]
    usual = ["--budget", "1/4", "1/2", "--limit", "2", "--max-new-tokens", "6", "--baselines", "svd", "average"]
    return ["study", str(output), *map(str, places), *usual, "--answers-for", "svd", *map(str, more)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "study"
    assert main(command(folder, output, "--long", folder / "long")) == 0
    return output


@pytest.fixture
def summary(finished):
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture
def work(monkeypatch):
    """Counts what costs time: adapters that go through the model, fits, and runs over calibration text."""
    done = []

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: done.append(name) or original(*a, **k))

    counted(evaluate, "score")
    counted(study, "compress")
    counted(study, "gather_cached")
    counted(study, "distil_collection")
    counted(baselines, "baseline")
    monkeypatch.setattr(
        SwitchableModel,
        "load",
        staticmethod(lambda *a, load=SwitchableModel.load, **k: done.append("load") or load(*a, **k)),
    )
    return done


def test_every_part_is_in_the_summary_and_the_plots_are_small(finished, summary):
    assert set(summary) == {"ours", "baselines", "sweep", "ranks", "leakage", "convergence", "long"}
    rows = {row["variant"]: row for part in ("ours", "baselines") for row in summary[part]["tables"][""]}
    assert set(rows) == {"base", "uncompressed"} | {
        f"{name}: {share}" for name in ("ours", "svd", "average") for share in ("1/4", "1/2")
    }
    assert rows["ours: 1/2"]["rouge_l"] is not None and rows["svd: 1/2"]["rouge_l"] is not None
    assert rows["average: 1/2"]["rouge_l"] is None and rows["average: 1/2"]["loss"] > 0
    assert rows["ours: 1/2"]["output_error"] < rows["ours: 1/4"]["output_error"] < 1
    assert all(part["refused"] == {} for part in summary.values())
    assert summary["ours"]["settings"]["budgets"] == ["1/4", "1/2"]
    plots = {path.name: path.stat().st_size for path in (finished / "plots").iterdir()}
    assert set(plots) == {"bytes.svg", "error.svg", "clusters.svg", "convergence.svg"}
    assert max(plots.values()) < 60_000


def test_records_are_those_that_an_evaluation_by_hand_gives(folder, finished):
    adapters, _ = read_adapters([folder / "adapters"])
    collection = Collection.open(finished / "collections" / "ours-1-2")
    assert collection.manifest.quantize == "int8" and collection.manifest.metric == "activation"
    by_hand = Evaluation(
        SwitchableModel.load(folder / "model"),
        adapters,
        read_tasks(folder / "tasks", adapters, 2),
        RecordFile(None),
        max_new_tokens=6,
    )
    from vllm_jdlora.evaluation.variant import of_collection

    expected = list(by_hand.run([of_collection(collection, "ours: 1/2")]))
    found = {(r.variant, r.adapter): r for r in RecordFile(finished / "records" / "ours.jsonl").records}
    for record in expected:
        own = found[record.variant, record.adapter]
        # Keys hold the moments that output errors are judged by, which this evaluation has not.
        assert replace(own, key=record.key, output_error=None) == record


def test_scores_beside_truncated_adapters_count_beside_the_originals_too(folder, finished, summary):
    adapters, _ = read_adapters([folder / "adapters"])
    cut, _ = read_adapters([finished / "adapters" / "rank-2"])
    by_hand = Evaluation(
        SwitchableModel.load(folder / "model"),
        adapters,
        read_tasks(folder / "tasks", adapters, 2),
        RecordFile(None),
        max_new_tokens=6,
    )
    expected = by_hand.measure(replace(uncompressed(cut), name="truncated: rank 2"), "c", "c")
    records = {(r.variant, r.adapter): r for r in RecordFile(finished / "records" / "ranks.jsonl").records}
    own = records["truncated: rank 2", "c"]
    assert replace(own, key=expected.key, output_error=None) == expected
    assert 0 < own.relative_error < records["ours: rank 2", "c"].relative_error
    tables = summary["ranks"]["tables"]
    assert list(tables) == [
        "against the original adapters",
        "against the adapters truncated to rank 2",
        "against the adapters truncated to rank 4",
    ]
    rows = {title: {row["variant"]: row for row in rows} for title, rows in tables.items()}
    own_rank = rows["against the adapters truncated to rank 2"]
    assert own_rank["uncompressed"]["relative_error"] == 0
    # Fewer directions to hold in the same bases.
    whole = rows["against the adapters truncated to rank 4"]["ours: rank 4"]["relative_error"]
    assert own_rank["ours: rank 2"]["relative_error"] < whole


def test_the_sweep_takes_the_largest_rank_that_fits_and_errors_are_dense_ones(folder, finished, summary):
    adapters, _ = read_adapters([folder / "adapters"])
    whole = 2 * sum(adapter.parameters for adapter in adapters)
    sides = [part.shape.d_out + part.shape.d_in for part in adapters[0].slices.values()]

    def bytes_of(k, rank):  # int8 bases and their fp32 scales, bf16 Σ
        return sum(k * rank * (side + 8) + 4 * rank * rank * 2 for side in sides)

    points = summary["sweep"]["points"]
    assert {(p["budget"], p["clusters"]) for p in points} == {(b, k) for b in ("1/4", "1/2") for k in (1, 2)}
    for point in points:
        budget = float(Fraction(point["budget"])) * whole
        assert bytes_of(point["clusters"], point["rank"]) <= budget < bytes_of(point["clusters"], point["rank"] + 1)
        assert point["loss"] > 0
    point = points[-1]
    collection = Collection.open(
        finished
        / "collections"
        / f"sweep-{point['budget'].replace('/', '-')}-full-K{point['clusters']}-R{point['rank']}"
    )
    errors = [entry.relative_error for entry in collection.manifest.adapters]
    # The manifest's are of the very same stored values; both sum in fp64.
    assert point["relative_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def dense_alternations(deltas, rank, seed, rounds):
    """Energy lost after each round of the published iteration from its start, by dense SVDs; mean over adapters."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=draw)).Q.double() for size in deltas[0].shape)
    lost = []
    for _ in range(rounds + 1):
        lost.append(sum(float((d - u @ (u.T @ d @ v) @ v.T).norm() ** 2) for d in deltas) / len(deltas))
        u = torch.linalg.svd(torch.cat([d @ v for d in deltas], 1), full_matrices=False).U[:, :rank]
        v = torch.linalg.svd(torch.cat([d.T @ u for d in deltas], 1), full_matrices=False).U[:, :rank]
    return lost


def test_convergence_goes_and_ends_as_the_methods_do(folder, summary):
    adapters, _ = read_adapters([folder / "adapters"])
    lost, rounds = [], []
    for name in summary["convergence"]["slices"]:
        factors = [Factors(*adapter.factors(name)) for adapter in adapters]
        rank = 8  # half of the 16 directions there are
        deltas = [(f.b @ f.a).double() / (f.b @ f.a).double().norm() for f in factors]
        for seed in range(3):
            rounds.append(dense_alternations(deltas, rank, seed, 2))
            kept = jd_published(factors, rank, seed=seed).factors
            for f, k in zip(factors, kept, strict=True):
                delta = (f.b @ f.a).double()
                lost.append(float(((delta - (k.b @ k.a).double()).norm() / delta.norm()) ** 2))
    curves = summary["convergence"]["energy_lost"]
    hosvd, published, diag = curves.values()
    # The start is the same; a randomised SVD of two power steps finds less than the dense one.
    expected = [sum(values) / len(values) for values in zip(*rounds, strict=True)]
    assert published[0] == pytest.approx(expected[0], abs=1e-5)
    assert published[1:3] == pytest.approx(expected[1:], abs=0.02) and published[2] < published[1] - 0.04
    # Products in fp32.
    assert published[-1] == pytest.approx(sum(lost) / len(lost), abs=1e-5) and len(published) == 11
    assert hosvd == sorted(hosvd, reverse=True) and diag == sorted(diag, reverse=True)
    assert hosvd[-1] <= published[-1] and hosvd[0] < published[0]


def test_long_adapters_are_compressed_together_and_so_are_their_namesakes(folder, finished, summary):
    part = summary["long"]
    assert part["names"] == ["a", "b"] and part["budget"] == str(max(BUDGETS))
    assert set(part["tables"]) == {"trained longer", "the same tasks, as the others"}
    for label, source in (("long", "long"), ("long-short", "adapters")):
        manifest = Collection.open(finished / "collections" / label).manifest
        kept = sorted((entry.name, entry.sha256) for entry in (*manifest.adapters, *manifest.plain))
        adapters, _ = read_adapters([folder / source / name for name in ("a", "b")])
        assert kept == [(adapter.name, adapter.sha256) for adapter in adapters]


def test_a_finished_study_loads_no_model_and_fits_nothing(folder, finished, work, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(command(folder, finished, "--long", folder / "long")) == 0
    assert work == []
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before
    shown = capsys.readouterr().out
    assert "ours: 1/2" in shown and "JD-Diag: energy lost" in shown and "against the original adapters" in shown


def test_a_study_killed_anywhere_goes_on_and_nothing_is_measured_twice(folder, tmp_path, work, monkeypatch):
    parts, only = ("ours", "baselines", "leakage"), ["a", "b"]
    whole = tmp_path / "whole"
    run_study(settings(folder, whole, *parts, only=only))
    needed = sorted(work)
    work.clear()

    class Killed(BaseException):
        pass

    score, broken = evaluate.score, tmp_path / "broken"
    for after in (1, 4, 6):  # in the references, in ours, in the baselines

        def score_until(*arguments, left=[after], **more):  # noqa: B006
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return score(*arguments, **more)

        with monkeypatch.context() as patched:
            patched.setattr(evaluate, "score", score_until)
            with pytest.raises(Killed):
                run_study(settings(folder, broken, *parts, only=only))
    with open(broken / "records" / "baselines.jsonl", "ab") as file:
        file.write(b'{"key": "half a li')
    run_study(settings(folder, broken, *parts, only=only))
    # A kill between the base model's score and the uncompressed adapter's, which both records need, costs the first.
    assert needed.count("score") <= work.count("score") <= needed.count("score") + 1
    assert work.count("compress") == needed.count("compress") == len(BUDGETS)
    # Each of the three kills may cost the fit of the baseline that was being measured once more.
    assert needed.count("baseline") <= work.count("baseline") <= needed.count("baseline") + 3
    for stem in parts:
        resumed, at_once = (RecordFile(output / "records" / f"{stem}.jsonl").records for output in (broken, whole))
        assert resumed == at_once
    assert (broken / "summary.json").read_text() == (whole / "summary.json").read_text().replace(
        str(whole), str(broken)
    )


def test_what_one_part_measured_another_takes_from_its_records(folder, tmp_path, work):
    run_study(settings(folder, tmp_path / "s", "ours", only=["a"]))
    before = work.count("score")
    run_study(settings(folder, tmp_path / "s", "baselines", only=["a"]))
    assert work.count("score") - before == 2 * 2  # the baselines alone, not base and uncompressed
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert set(summary) == {"ours", "baselines"}


def test_a_budget_that_is_too_small_is_said_and_the_others_are_measured(folder, tmp_path, capsys):
    more = ["--parts", "ours", "baselines", "--only", "a", "--budget", "1/2", "1/50"]
    assert main(command(folder, tmp_path / "s", *more)) == 0
    shown = capsys.readouterr().out
    assert "ours: 1/50: not measured:" in shown and "svd: 1/50: not measured:" in shown and "ours: 1/2" in shown
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert set(summary["ours"]["refused"]) == {"ours: 1/50"}
    assert set(summary["baselines"]["refused"]) == {"svd: 1/50", "average: 1/50"}


def test_collections_are_measured_after_distillation_too_and_none_is_distilled_twice(folder, tmp_path, work):
    output = tmp_path / "s"
    distillation = DistillationSettings(steps=4, batch=4, learning_rate=0.1)
    more = {"only": ["a"], "budgets": BUDGETS[:1], "metric": "frobenius", "distillation": distillation}
    parts = run_study(settings(folder, output, "ours", **more))
    rows = {row.variant: row for row in parts["ours"].tables[""]}
    plain, distilled = rows["ours, frobenius: 1/4"], rows["ours, frobenius, distilled: 1/4"]
    assert distilled.bytes_per_adapter == plain.bytes_per_adapter and distilled.rouge_l is not None
    before = Collection.open(output / "collections" / "ours-frobenius-1-4")
    after = Collection.open(output / "collections" / "ours-frobenius-1-4-distilled")
    assert all(
        torch.equal(x, y)
        for part in before.manifest.slices
        for x, y in zip(before.basis(part.name), after.basis(part.name), strict=True)
    )
    assert work.count("distil_collection") == 1
    work.clear()
    run_study(settings(folder, output, "ours", **more))
    assert work == []
    run_study(settings(folder, output, "ours", **more | {"distillation": replace(distillation, steps=5)}))
    assert work.count("distil_collection") == 1 and "compress" not in work


def test_the_distillation_sees_training_items_alone(folder, tmp_path, monkeypatch):
    seen = []
    distil = Distiller.distil

    def watched(self, adapter, bases, sigma, examples, *more):
        seen.append(len(examples))
        return distil(self, adapter, bases, sigma, examples, *more)

    monkeypatch.setattr(Distiller, "distil", watched)
    more = {"only": ["a"], "budgets": BUDGETS[:1], "distillation": DistillationSettings(steps=1, batch=4)}
    run_study(settings(folder, tmp_path / "s", "ours", **more))
    assert seen == [16] * len(NAMES)  # 80 % of 20 items


@pytest.mark.parametrize("answers_for", [(), None])
def test_baselines_on_fewer_items_have_ours_beside_them_on_these(folder, tmp_path, answers_for):
    same = {"baselines": ("svd",), "answers_for": answers_for, "only": ["a", "b"]}
    few = run_study(settings(folder, tmp_path / "few", "ours", "baselines", **same, limit=1))
    more = {"limit": 2, "baseline_limit": 1, "baseline_budgets": BUDGETS[1:]}
    both = run_study(settings(folder, tmp_path / "both", "ours", "baselines", **same, **more))
    expected = {row.variant: row for row in few["baselines"].tables[""] if row.variant != "svd: 1/4"}
    rows = {row.variant: row for row in both["baselines"].tables[""]}
    assert list(rows) == list(expected) and {"ours: 1/4", "ours: 1/2", "svd: 1/2"} < set(rows)
    for name, row in rows.items():
        own = expected[name]
        # Losses by item are kept to six digits.
        assert row.loss == pytest.approx(own.loss, abs=2e-6) and row.token_accuracy == own.token_accuracy
        assert (row.rouge_l, row.exact_match, row.agreement) == (own.rouge_l, own.exact_match, own.agreement)
        assert (row.rouge_l is None) is (answers_for == ())
    assert {row.variant: row.rouge_l is None for row in both["ours"].tables[""]}["ours: 1/2"] is False


@pytest.mark.parametrize(("method", "metric"), [("diag", "frobenius"), ("full", "fisher")])
def test_method_and_metric_are_passed_on_and_name_the_curve(folder, tmp_path, method, metric):
    more = {"only": ["a"], "budgets": BUDGETS[:1], "method": method, "metric": metric}
    parts = run_study(settings(folder, tmp_path / "s", "ours", **more))
    name = "ours, diag, frobenius" if method == "diag" else "ours, fisher"
    assert [row.variant for row in parts["ours"].tables[""]][2:] == [f"{name}: 1/4"]
    manifest = Collection.open(tmp_path / "s" / "collections" / f"{name.replace(', ', '-')}-1-4").manifest
    assert manifest.method == method and manifest.metric == metric


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--parts", "theirs"], "no part named 'theirs': choose from ours"),
        (["--parts", "long"], "give their folder as --long"),
        (["--answers-for", "magic"], "--answers-for: no baseline named 'magic'"),
        (["--only", "x"], "--only: no adapter named 'x'"),
    ],
)
def test_what_cannot_be_studied_is_said_in_one_line(folder, tmp_path, more, reason, capsys):
    assert main([*command(folder, tmp_path / "s"), *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1 and reason in lines[0]


def test_a_folder_with_a_study_of_other_adapters_is_refused(folder, finished, tmp_path):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    shutil.rmtree(tmp_path / "adapters" / "d")
    with pytest.raises(JDLoRAError, match="holds a study of other adapters"):
        run_study(settings(folder, finished, "ours", adapters=[tmp_path / "adapters"]))


def test_truncate_writes_a_folder_of_adapters(folder, tmp_path, capsys):
    assert main(["truncate", str(folder / "adapters"), "-o", str(tmp_path / "cut"), "--rank", "2"]) == 0
    assert "4 adapters of rank 2 at most" in capsys.readouterr().out
    cut, _ = read_adapters([tmp_path / "cut"])
    assert [a.name for a in cut] == list(NAMES) and {a.rank for a in cut} == {2}
    original = read_adapters([folder / "adapters" / "a"])[0][0]
    for name in original.slices:
        b, a = original.factors(name)
        kept_b, kept_a = cut[0].factors(name)
        left = torch.linalg.svdvals((b @ a).double() - (kept_b @ kept_a).double())
        # The best of rank 2 leaves the singular values from the third on; fp32 storage.
        assert torch.allclose(left[:2], torch.linalg.svdvals((b @ a).double())[2:4], rtol=1e-4)
    assert main(["truncate", str(folder / "adapters"), "-o", str(tmp_path / "cut"), "--rank", "2"]) == 2
