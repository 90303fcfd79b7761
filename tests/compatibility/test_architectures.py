"""Tiny random models of each architecture with random adapters, served by the real engine: equal to merged weights."""

from pathlib import Path

import pytest
import torch

from tests import reference, tiny_models
from tests.compatibility import engines
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError

COMPRESSED = ["first", "second", "third"]
PLAIN = "plain"
WHO = [*COMPRESSED, PLAIN, None]
PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(6 + 7 * i)] for i in range(len(WHO))]
# fp32 on both sides, two layers: differences come from the order of sums.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    """For each architecture its files and what an engine answered."""
    root = tmp_path_factory.mktemp("architectures")
    jobs = {name: write_files(root / name, name) for name in tiny_models.ARCHITECTURES}
    results = engines.run(*jobs.values())
    return {name: job | result for (name, job), result in zip(jobs.items(), results, strict=True)}


def write_files(root: Path, architecture: str) -> dict:
    """Three adapters on all linear layers in one cluster, and a plain one."""
    model = tiny_models.write_model(root / "model", architecture)
    folders = [tiny_models.write_adapter(root / name, model, seed) for seed, name in enumerate(COMPRESSED)]
    plain = tiny_models.write_adapter(root / PLAIN, model, 9, rank=6)
    collection = compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=1, dtype="fp32")
    return {
        "kind": "greedy",
        "model": str(model),
        "collection": str(collection.path),
        "plain": {PLAIN: str(plain)},
        "prompts": PROMPTS,
        "who": WHO,
    }


def deltas(files: dict, name: str | None) -> dict[str, torch.Tensor]:
    """ΔW of each module for one of WHO."""
    if name is None:
        return {}
    if name in files.get("plain", {}):
        return reference.plain_deltas(Path(files["plain"][name]))
    return reference.compressed_deltas(Path(files["collection"]), name)


@pytest.mark.server
@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_compressed_plain_and_base_answers_equal_merged_weights(served, architecture):
    files = engines.answered(served[architecture])
    model = tiny_models.read_model(files["model"])
    base = files["answers"][WHO.index(None)]
    for name, prompt, answer in zip(WHO, PROMPTS, files["answers"], strict=True):
        with reference.merged(model, deltas(files, name)) as merged:
            reference.check_greedy(merged, prompt, answer["tokens"], answer["logprobs"], TOLERANCE)
        if name is not None:  # and the adapter matters: the base model would not have said so
            with pytest.raises(AssertionError):
                reference.check_greedy(model, prompt, answer["tokens"], answer["logprobs"], TOLERANCE)
    assert len(base["tokens"]) == 8


EXPERT = "model.layers.0.mlp.experts.0.up_proj"


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A mixture of experts, an adapter on attention, and two that change an expert too."""
    root = tmp_path_factory.mktemp("experts")
    model = tiny_models.write_model(root / "model", "qwen3_moe")
    tiny_models.write_adapter(root / "attention" / "good", model, 0)
    for i in range(2):
        tiny_models.write_adapter(root / "expert" / f"bad-{i}", model, 1 + i, more=[(EXPERT, (64, 64))])
    return root


def test_expert_targets_cannot_be_compressed_and_are_named(experts, capsys):
    assert main(["compress", str(experts / "expert"), "-o", str(experts / "none"), "--rank", "4"]) == 2
    told = capsys.readouterr().err
    assert "bad-0" in told and "mixture-of-experts" in told and EXPERT in told


def test_a_server_refuses_adapters_of_experts_by_name_before_it_loads_the_model(experts, capsys):
    from vllm.engine.arg_utils import EngineArgs

    from vllm_jdlora.serving.engine_settings import apply_to_engine_args

    folders = [str(experts / "attention" / "good"), str(experts / "expert" / "bad-1")]
    assert main(["compress", *folders, "-o", str(experts / "mixed"), "--rank", "4", "--clusters", "1"]) == 0
    options = {"jdlora": {"collection": str(experts / "mixed")}}
    with pytest.raises(JDLoRAError, match=f"'bad-1' cannot be served: .*mixture-of-experts weights.*{EXPERT}"):
        apply_to_engine_args(EngineArgs(model=str(experts / "model"), additional_config=options))
