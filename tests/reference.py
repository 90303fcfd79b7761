"""The independent reference of all serving tests: HF transformers in fp32 with the adapter merged into the weights.

It reads collections and adapters straight from their safetensors files and shares no code with the package.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file


def compressed_deltas(collection: Path, name: str) -> dict[str, torch.Tensor]:
    """ΔW = U Σ V [d_out, d_in] of every slice of a compressed adapter, by module path."""
    manifest = json.loads((collection / "collection.json").read_text())
    row = [a["name"] for a in manifest["adapters"]].index(name)
    cluster = manifest["adapters"][row]["cluster"]
    for shard in sorted(collection.glob("scalings-*.safetensors")):
        with safe_open(shard, "pt") as f:
            rows = f.get_slice("sigma").get_shape()[0]
            if row < rows:
                sigma = f.get_slice("sigma")[row : row + 1][0].double()
                break
            row -= rows
    deltas = {}
    with safe_open(collection / "bases.safetensors", "pt") as f:
        for i, entry in enumerate(manifest["slices"]):
            u = f.get_tensor(f"{entry['name']}.U")[cluster].double()
            v = f.get_tensor(f"{entry['name']}.V")[cluster].double()
            if manifest["quantize"] != "none":
                u = u * f.get_tensor(f"{entry['name']}.U_scale")[cluster].double()
                v = v * f.get_tensor(f"{entry['name']}.V_scale")[cluster].double()[:, None]
            scaling = torch.diag(sigma[i]) if manifest["method"] == "diag" else sigma[i]
            deltas[entry["name"]] = (u @ scaling @ v).float()
    return deltas


def plain_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW = α/r · B A [d_out, d_in] of every module of a PEFT folder (no patterns, no rsLoRA)."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    return {
        key[len(prefix) : -len(suffix)]: scale
        * (tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()).float()
        for key in tensors
        if key.endswith(suffix)
    }


def projected_deltas(collection: Path, folder: Path, cluster: int) -> dict[str, torch.Tensor]:
    """U Σ V [d_out, d_in] with the least-squares Σ = U⁺ ΔW V⁺ of a PEFT folder, in the collection's dtype."""
    manifest = json.loads((collection / "collection.json").read_text())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[manifest["dtype"]]
    deltas = {}
    with safe_open(collection / "bases.safetensors", "pt") as f:
        for name, delta in plain_deltas(folder).items():
            u, v = (f.get_tensor(f"{name}.{side}")[cluster].double() for side in "UV")
            sigma = (torch.linalg.pinv(u) @ delta.double() @ torch.linalg.pinv(v)).float().to(dtype)
            deltas[name] = (u @ sigma.double() @ v).float()
    return deltas


@contextmanager
def merged(model: torch.nn.Module, deltas: dict[str, torch.Tensor]) -> Iterator[torch.nn.Module]:
    """The HF model with these ΔW added to its weights, which are put back afterwards."""
    kept = {name: model.get_submodule(name).weight.data.clone() for name in deltas}
    try:
        for name, delta in deltas.items():
            model.get_submodule(name).weight.data += delta
        yield model
    finally:
        for name, weight in kept.items():
            model.get_submodule(name).weight.data.copy_(weight)


@torch.no_grad()
def check_greedy(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], logprobs: Sequence[float], tolerance: float
) -> float:
    """Assert that `answer` is the model's greedy continuation with these logprobs; the largest difference found.

    Where the two best tokens are closer than the tolerance, either is right.
    """
    assert len(answer) == len(logprobs) > 0
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1)
    chosen = expected[torch.arange(len(answer)), torch.tensor(answer)]
    worst = (chosen - torch.tensor(logprobs)).abs().max().item()
    assert worst <= tolerance, f"logprobs differ by {worst:.2e} from the reference"
    behind = (expected.max(-1).values - chosen).max().item()
    assert behind <= tolerance, f"a token {behind:.2e} below the best was chosen"
    return worst
