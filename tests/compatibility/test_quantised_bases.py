"""Quantised base models under compressed adapters: served, or refused where vLLM cannot put LoRA on them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference, tiny_models
from tests.compatibility import engines
from tests.compatibility.test_architectures import COMPRESSED, PROMPTS, WHO, deltas, write_files

pytestmark = pytest.mark.server

GROUP = 32
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
# The model runs in fp16.
TOLERANCE = 0.05


def to_8_bits(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of compressed-tensors for one weight [d_out, d_in], and what they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    steps = (weight / scale).round().clamp(-127, 127)
    return {f"{name}.weight": steps.to(torch.int8), f"{name}.weight_scale": scale}, steps * scale


def in_steps(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of 4 bits: numbers 0..15 [d_in, d_out], scales fp16 [groups, d_out], and what both stand for [d_out, d_in]."""
    d_out, d_in = weight.shape
    grouped = weight.view(d_out, d_in // GROUP, GROUP)
    scale = (grouped.abs().amax(2, keepdim=True) / 7).half().float()
    steps = (grouped / scale).round().clamp(-8, 7)
    numbers = (steps.view(d_out, d_in).T + 8).to(torch.int64)
    return numbers, scale[:, :, 0].T.contiguous().half(), (steps * scale).view(d_out, d_in)


def to_gptq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's tensors for one weight [d_out, d_in], eight numbers of one output in an int32; and what they stand for."""
    d_out, d_in = weight.shape
    numbers, scales, meant = in_steps(weight)
    packed = (numbers.view(d_in // 8, 8, d_out) << 4 * torch.arange(8)[:, None]).sum(1)
    zeros = torch.full((d_in // GROUP, d_out // 8), 0x77777777)  # 8, less one
    tensors = {"qweight": as_int32(packed), "qzeros": as_int32(zeros), "scales": scales}
    tensors["g_idx"] = torch.arange(d_in, dtype=torch.int32) // GROUP
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, meant


def to_awq(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """AWQ's tensors for one weight [d_out, d_in], eight outputs in an int32, even ones first; what they stand for."""
    d_out, d_in = weight.shape
    numbers, scales, meant = in_steps(weight)
    packed = (numbers.view(d_in, d_out // 8, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]] << 4 * torch.arange(8)).sum(2)
    zeros = torch.full((d_in // GROUP, d_out // 8), 0x88888888)
    tensors = {"qweight": as_int32(packed), "qzeros": as_int32(zeros), "scales": scales}
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}, meant


def as_int32(numbers: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64."""
    return torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32).contiguous()


def quantised_model(source: Path, folder: Path, config: dict, quantise) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a model with its linear layers quantised, and the weights that they stand for."""
    tensors, meant = load_file(source / "model.safetensors"), {}
    for name in tiny_models.linear_shapes(source):
        stored, meant[name] = quantise(name, tensors.pop(f"{name}.weight"))
        tensors |= stored
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written))
    return folder, meant


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, dict]:
    root = tmp_path_factory.mktemp("quantised")
    files = write_files(root, "llama")
    half = {"dtype": "float16"}
    kinds = {"int8": (INT8, to_8_bits, {}), "gptq": (GPTQ, to_gptq, half), "awq": (AWQ, to_awq, half)}
    jobs = {}
    for kind, (config, quantise, options) in kinds.items():
        model, meant = quantised_model(Path(files["model"]), root / kind, config, quantise)
        jobs[kind] = (files | {"model": str(model), "options": options}, meant)
    results = engines.run(*(job for job, _ in jobs.values()))
    return {
        kind: files | {"meant": meant, "result": result}  # files' own model is the one before quantisation
        for (kind, (_, meant)), result in zip(jobs.items(), results, strict=True)
    }


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM takes other int8 kernels on AMX")
def test_int8_activations_are_refused_where_the_kernel_hides_the_weights(served):
    assert "vLLM's LoRA layers cannot see on this platform" in served["int8"]["result"]["error"]


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_answers_equal_an_adapter_on_the_weights_that_the_quantised_ones_stand_for(served, kind):
    files = served[kind]
    answers = engines.answered(files["result"])["answers"]
    model = tiny_models.read_model(files["model"])
    for layer, weight in files["meant"].items():
        model.get_submodule(layer).weight.data = weight
    for name, prompt, answer in zip(WHO, PROMPTS, answers, strict=True):
        with reference.merged(model, deltas(files, name)) as merged:
            reference.check_greedy(merged, prompt, answer["tokens"], answer["logprobs"], TOLERANCE)
    # Far less than what the adapters change.
    assert len({tuple(answers[WHO.index(name)]["tokens"]) for name in (*COMPRESSED, None)}) == len(COMPRESSED) + 1
