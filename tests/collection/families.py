"""PEFT folders whose adapters come in families: the same column and row spaces in every module, plus noise."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {"q_proj": (48, 40), "k_proj": (24, 40)}
LAYERS = 2


def write_member(
    folder: Path, family: int, seed: int, *, rank: int = 4, noise: float = 0.02, shapes: dict | None = None
) -> Path:
    """One adapter of a family: ΔW = L_f C R_f with its own random core C, plus noise in B and A."""
    draw = torch.Generator().manual_seed(1000 + seed)
    tensors = {}
    for layer in range(LAYERS):
        for place, (target, (d_out, d_in)) in enumerate((shapes or SHAPES).items()):
            common = torch.Generator().manual_seed(10_000 * family + 100 * layer + place)
            left = torch.linalg.qr(torch.randn(d_out, rank, generator=common)).Q
            right = torch.linalg.qr(torch.randn(d_in, rank, generator=common)).Q
            b = left @ torch.randn(rank, rank, generator=draw) + noise * torch.randn(d_out, rank, generator=draw)
            a = right.T + noise * torch.randn(rank, d_in, generator=draw)
            key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.contiguous(), b.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(shapes or SHAPES),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
