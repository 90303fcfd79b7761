"""Offline `LLM(...)` with compressed adapters, in one process and under tensor parallelism, against HF transformers.

Each engine runs in a process of its own (`python -m tests.serving.offline_engine`): one process takes one vLLM.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import reference, tiny_llama
from tests.serving import offline_engine
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress

pytestmark = pytest.mark.server

PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(8 + 5 * i)] for i in range(9)]
COMPRESSED = [f"adapter-{i}" for i in range(5)]
PLAIN = ["plain-0", "plain-1"]
# More distinct adapters than slots of either kind, twice the same one, and the base: one batch if it were allowed.
WHO = [*COMPRESSED, None, *PLAIN, COMPRESSED[0]]

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


def run_engine(served, **options) -> dict:
    model, collection, plain = served
    spec = {
        "model": str(model),
        "prompts": PROMPTS,
        "who": WHO,
        "plain": {name: str(path) for name, path in plain.items()},
        "jdlora": {"collection": str(collection), **options.pop("jdlora", {})},
        "interrupted": INTERRUPTED,
        **({"intruder": options.pop("intruder")} if "intruder" in options else {}),
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


def check_against_merged_weights(served, answers: list[dict], places: Sequence[int] = range(len(WHO))) -> None:
    from transformers import LlamaForCausalLM

    model_path, collection, plain = served
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
    out = run_engine(served, jdlora={"scaling_slots": 2}, max_loras=1, intruder=COMPRESSED[2])
    check_against_merged_weights(served, out["answers"])
    # The batch stays the same while its Σ move to other slots.
    check_against_merged_weights(served, out["interrupted"], INTERRUPTED)
    assert out["statistics"][0]["resident"] == 2
    assert out["statistics"][0]["wrapped_modules"] == 4 * tiny_llama.LAYERS  # no lm_head, no embeddings
    # vLLM's runner tells the manager requests, and a batch that goes on decoding is not planned again.
    assert 0 < out["statistics"][0]["plans"] < out["statistics"][0]["steps"]


def test_two_tensor_parallel_processes_equal_merged_weights_with_diagonal_scalings_and_bases_in_8_bits(served):
    model, collection, plain = served
    small = model, collection.with_name("small"), plain
    out = run_engine(small, max_loras=2, tensor_parallel_size=2)
    check_against_merged_weights(small, out["answers"])
    assert [s["resident"] for s in out["statistics"]] == [5, 5]
