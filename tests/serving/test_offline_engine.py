"""Offline `LLM(...)` with compressed adapters, in one process and under tensor parallelism, against HF transformers.

Each engine runs in a process of its own (`python -m tests.serving.offline_engine`): one process takes one vLLM.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import reference, tiny_llama
from tests.serving import offline_engine
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add
from vllm_jdlora.serving.options import AdapterPath

pytestmark = pytest.mark.server

PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(8 + 5 * i)] for i in range(9)]
COMPRESSED = [f"adapter-{i}" for i in range(5)]
PLAIN = ["plain-0", "plain-1"]
# More distinct adapters than slots of either kind, twice the same one, and the base: one batch if it were allowed.
WHO = [*COMPRESSED, None, *PLAIN, COMPRESSED[0]]
EXTRA = ("intruder", "unreadable", "beside", "revision", "other_bases", "unfit")
"""What `offline_engine` does besides."""

# Places in WHO: two requests of one adapter and one of another.
INTERRUPTED = [0, 8, 1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny model, a collection of five adapters in two clusters (o_proj and MLP included), two plain adapters.

    And the same adapters in another collection: diagonal scalings, bases in 8 bits.
    """
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_llama.write_model(root / "model")
    folders = [tiny_llama.write_adapter(root / name, seed) for seed, name in enumerate(COMPRESSED)]
    # One adapter that leaves out most modules, and one of another rank: their Σ is zero elsewhere.
    folders[3] = tiny_llama.write_adapter(root / "partial" / COMPRESSED[3], 33, targets=["q_proj", "down_proj"])
    folders[4] = tiny_llama.write_adapter(root / "wide" / COMPRESSED[4], 44, rank=7)
    collection = compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=2, dtype="fp32")
    compress([read_adapter(f) for f in folders], root / "small", rank=8, clusters=2, method="diag", quantize="int8")
    plain = {name: tiny_llama.write_adapter(root / name, 70 + i, rank=6) for i, name in enumerate(PLAIN)}
    return model, collection.path, plain


@pytest.fixture(scope="module")
def later(served, tmp_path_factory):
    """Collections that a running server may be given.

    One on the same bases, where an adapter was replaced under its name; one on other bases in the same form; two on
    other bases, with more and with fewer clusters and modules; one that does not fit.
    """
    _, collection, _ = served
    root = tmp_path_factory.mktemp("later")
    folders = [collection.parent / name for name in COMPRESSED[:3]]
    same = root / "same"
    shutil.copytree(collection, same)
    changed = read_adapter(tiny_llama.write_adapter(root / "changed", 99))
    add(same, [dataclasses.replace(changed, name=COMPRESSED[0])], replace_same_name=True, force=True)
    adapters = [read_adapter(f) for f in folders]
    adapters += [dataclasses.replace(changed, name=name) for name in COMPRESSED[3:]]
    more = compress(adapters, root / "more", rank=6, clusters=3, quantize="int8").path
    attention = [
        read_adapter(tiny_llama.write_adapter(root / "attention" / name, 50 + i, targets=["q_proj", "v_proj"]))
        for i, name in enumerate(COMPRESSED)
    ]
    fewer = compress(attention, root / "fewer", rank=8, clusters=1, dtype="fp32").path
    rebuilt = [read_adapter(tiny_llama.write_adapter(root / "rebuilt" / n, 80 + i)) for i, n in enumerate(COMPRESSED)]
    beside = compress(rebuilt, root / "beside", rank=8, clusters=2, dtype="fp32").path
    return SimpleNamespace(same=same, beside=beside, other_bases=[more, fewer], unfit=collection.with_name("small"))


def run_engine(served, **options) -> dict:
    model, collection, plain = served
    spec = {
        "model": str(model),
        "prompts": PROMPTS,
        "who": WHO,
        "plain": {name: str(path) for name, path in plain.items()},
        "jdlora": {"collection": str(collection), **options.pop("jdlora", {})},
        "interrupted": INTERRUPTED,
        **{name: options.pop(name) for name in EXTRA if name in options},
        "options": options,
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.serving.offline_engine"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answers = [line for line in result.stdout.splitlines() if line.startswith(offline_engine.MARK)]
    return json.loads(answers[0].removeprefix(offline_engine.MARK))


def check_against_merged_weights(
    served, answers: list[dict], places: Sequence[int] = range(len(WHO)), collection: Path | None = None
) -> None:
    from transformers import LlamaForCausalLM

    model_path, first_collection, plain = served
    collection = collection or first_collection
    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for place, answer in zip(places, answers, strict=True):
        name, prompt = WHO[place], PROMPTS[place]
        if name is None:
            deltas = {}
        elif name in plain:
            deltas = reference.plain_deltas(plain[name])
        else:
            deltas = reference.compressed_deltas(collection, name)
        with reference.merged(model, deltas):
            # fp32 on both sides, two layers: differences come from the order of sums.
            reference.check_greedy(model, prompt, answer["tokens"], answer["logprobs"], 1e-3)


def test_one_process_with_fewer_slots_than_adapters_equals_merged_weights(served):
    revision = Collection.open(served[1]).manifest.revision
    unreadable = {"lost": str(AdapterPath(revision, 0, "lost")), "gone": "/nowhere"}
    out = run_engine(served, jdlora={"scaling_slots": 2}, max_loras=1, intruder=COMPRESSED[2], unreadable=unreadable)
    check_against_merged_weights(served, out["answers"])
    # The batch stays the same while its Σ move to other slots.
    check_against_merged_weights(served, out["interrupted"], INTERRUPTED)
    assert out["statistics"][0]["resident"] == 2
    assert out["statistics"][0]["wrapped_modules"] == 4 * tiny_llama.LAYERS  # no lm_head, no embeddings
    # Adapters that cannot be read end their own requests and no others, however often they are asked for.
    for ended in (out["ended"], out["ended again"]):
        assert [reason for reason, _ in ended] == ["length", "error", "error", "length", "length"]
        assert [tokens for _, tokens in ended][1:3] == [[], []]
        assert ended[0][1] == out["answers"][0]["tokens"]
    # vLLM's runner tells the manager requests, and a batch that goes on decoding is not planned again.
    assert 0 < out["statistics"][0]["plans"] < out["statistics"][0]["steps"]


def test_what_an_earlier_start_compiled_is_loaded_for_other_collections_but_not_for_other_modules(
    served, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model, collection, plain = served

    def kept() -> dict[Path, int]:
        """Written anew by each compilation."""
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("cache/**/rank_0_0/model")}

    check_against_merged_weights(served, run_engine(served)["answers"])
    first = kept()
    assert len(first) == 1
    again = model, collection.parent / "small", plain
    check_against_merged_weights(again, run_engine(again)["answers"])
    assert kept() == first

    attention = {"targets": ["q_proj", "k_proj", "v_proj"]}
    folders = [tiny_llama.write_adapter(tmp_path / name, seed, **attention) for seed, name in enumerate(COMPRESSED)]
    plain = {n: tiny_llama.write_adapter(tmp_path / n, 70 + i, rank=6, **attention) for i, n in enumerate(PLAIN)}
    fewer = compress([read_adapter(f) for f in folders], tmp_path / "fewer", rank=8, clusters=2, dtype="fp32")
    other = model, fewer.path, plain
    check_against_merged_weights(other, run_engine(other)["answers"])
    assert len(kept()) == 2 and first.items() <= kept().items()


def test_with_one_base_slot_for_two_clusters_every_answer_equals_merged_weights(served):
    out = run_engine(served, jdlora={"base_slots": 1}, max_loras=2)
    check_against_merged_weights(served, out["answers"])
    statistics = out["statistics"][0]
    assert (statistics["clusters"], statistics["resident_bases"]) == (2, 1)
    assert statistics["base_swaps"] > 1


@pytest.mark.parametrize("base_slots", [None, 1])
def test_collections_are_swapped_below_a_running_engine(served, later, base_slots):
    """Requests keep the revision that they came with; other bases come into the same buffers, or nothing changes."""
    out = run_engine(
        served,
        jdlora={"base_slots": base_slots, "scaling_slots": 3},
        max_loras=2,
        revision=str(later.same),
        other_bases=[str(path) for path in later.other_bases],
        unfit=str(later.unfit),
    )
    check_against_merged_weights(served, out["answers"])
    before, after = out["revisions"][:3], out["revisions"][3:]
    check_against_merged_weights(served, before, INTERRUPTED)
    check_against_merged_weights(served, after, INTERRUPTED, later.same)
    replaced = WHO[INTERRUPTED[0]] == COMPRESSED[0]
    assert replaced and [a["tokens"] for a in before][:2] != [a["tokens"] for a in after][:2]
    replaced = out["replaced"]
    for answers, collection in zip(replaced["answers"], [*later.other_bases, later.other_bases[-1]], strict=True):
        check_against_merged_weights(served, answers, collection=collection)
    assert replaced["loaded"][0]["bases"] == "replaced"
    assert "JD-diag" in replaced["refusal"] and "Nothing was changed; restart the server" in replaced["refusal"]
    statistics = out["statistics"][0]
    assert (statistics["revisions"], statistics["clusters"], statistics["known"]) == (1, 1, 5)


def test_other_bases_come_beside_those_that_running_requests_use(served, later):
    out = run_engine(served, jdlora={"base_slots": 4, "scaling_slots": 4}, max_loras=2, beside=str(later.beside))
    check_against_merged_weights(served, out["answers"])
    collections = [None, later.beside, None]
    for i, answers in enumerate(out["beside"]):
        check_against_merged_weights(served, answers[:3], INTERRUPTED, collections[i])
        check_against_merged_weights(served, answers[3:], INTERRUPTED, collections[i + 1])
    statistics = out["statistics"][0]
    assert (statistics["clusters"], statistics["resident_bases"], statistics["revisions"]) == (2, 4, 2)


def test_two_tensor_parallel_processes_equal_merged_weights_with_diagonal_scalings_and_bases_in_8_bits(served):
    model, collection, plain = served
    small = model, collection.with_name("small"), plain
    out = run_engine(small, max_loras=2, tensor_parallel_size=2, jdlora={"base_bits": 8})
    check_against_merged_weights(small, out["answers"])
    assert [s["resident"] for s in out["statistics"]] == [5, 5]
