"""What a worker on CUDA does, in the real engine: vLLM's buffers and Triton's kernels, interpreted on the CPU."""

import json

import pytest

from tests import reference, tiny_models
from tests.compatibility import engines
from tests.compatibility.test_architectures import deltas
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection.build import compress

pytest.importorskip("triton")
pytestmark = pytest.mark.server

NAMES = ["first", "second", "third"]
WHO = ["first", None, "third"]
PROMPTS = [[(5 * i + 31 * j) % 250 + 2 for i in range(6)] for j in range(3)]
# fp16 with sums in fp32: what two layers of it lose against fp32.
TOLERANCE = 0.03
KINDS = {
    "16-bit": ({"method": "full"}, {}, []),
    "8-bit": ({"method": "diag", "quantize": "int8"}, {"base_bits": 8}, ["--jd-base-bits", "8"]),
}
SLOTS = 2


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    """Adapters of q_proj and down_proj, so that buffers have slices that no adapter changes."""
    root = tmp_path_factory.mktemp("gpu")
    model = tiny_models.write_model(root / "model", "llama")
    folders = [
        tiny_models.write_adapter(root / name, model, i, wanted=lambda n: n.endswith(("q_proj", "down_proj")))
        for i, name in enumerate(NAMES)
    ]
    adapters = [read_adapter(folder) for folder in folders]
    jobs = {}
    for kind, (choices, jdlora, flags) in KINDS.items():
        collection = compress(adapters, root / kind, rank=12, clusters=1, **choices)
        options = {
            "dtype": "float16",
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_model_len": 32,
            "max_loras": SLOTS,
            "additional_config": {"jdlora": {"collection": str(collection.path), **jdlora}},
        }
        jobs[kind] = {
            "kind": "greedy_and_bytes",
            "model": str(model),
            "collection": str(collection.path),
            "flags": flags,
            "prompts": PROMPTS,
            "who": WHO,
            "tokens": 3,
            "options": options,
        }
    results = engines.run(*jobs.values(), gpu_path=True)
    return {kind: job | result for (kind, job), result in zip(jobs.items(), results, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_bytes_that_the_worker_allocates(served, kind, capsys):
    files = engines.answered(served[kind])
    command = ["plan", files["collection"], "--base-model", files["model"], "--max-loras", str(SLOTS), *files["flags"]]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["choices"][0]["bytes"]["device"]
    allocated = files["bytes"]
    assert (planned["bases"], planned["plain_slots"]) == (allocated["bases"], allocated["plain_slots"])
    assert planned["each_adapter"] * allocated["slots"] == allocated["scalings"]
    assert planned["total"] == sum(allocated[part] for part in ("bases", "plain_slots", "scalings"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_merged_weights(served, kind):
    check(engines.answered(served[kind]))


def test_answers_of_fully_sharded_layers_in_two_processes_equal_merged_weights(served):
    """A is cut by ranks and gathered, or B by outputs, before and after Σ, which needs all of V x."""
    files = served["16-bit"]
    options = files["options"] | {"tensor_parallel_size": 2, "fully_sharded_loras": True}
    # Two workers on a machine of two cores: one thread each, wherever there is room.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    (result,) = engines.run(files | {"kind": "greedy", "options": options}, gpu_path=True, env=env)
    check(files | engines.answered(result))


def check(files: dict) -> None:
    model = tiny_models.read_model(files["model"])
    for name, prompt, answer in zip(WHO, PROMPTS, files["answers"], strict=True):
        with reference.merged(model, deltas(files, name)) as merged:
            reference.check_greedy(merged, prompt, answer["tokens"], answer["logprobs"], TOLERANCE)
