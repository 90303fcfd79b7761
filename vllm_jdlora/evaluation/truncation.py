"""Adapters cut to a lower rank by SVD, as PEFT folders: the rank ablation (the paper's H.1) compresses them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.peft_config import CONFIG_FILE


def truncate_all(adapters: Sequence[Adapter], rank: int, folder: Path, *, force: bool = False) -> list[Path]:
    """``truncated`` of each adapter, in ``folder/NAME``."""
    return [truncated(adapter, rank, Path(folder) / adapter.name, force=force) for adapter in adapters]


def truncated(adapter: Adapter, rank: int, output: Path, *, force: bool = False) -> Path:
    """Write the nearest adapter of ``rank`` (‖ΔW − ΔW'‖ least in each slice), scale 1, fp32.

    Slices of a lower rank keep it. The config is the adapter's own but for rank and scale.

    Raises:
        JDLoRAError: ``output`` exists (without ``force``) or cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in adapter.slices:
        factors = adapter.factors(name)
        assert factors is not None
        b, a = best_of_rank(*factors, rank)
        key_a, key_b = adapter.keys[name]
        tensors[key_a], tensors[key_b] = a.float().contiguous(), b.float().contiguous()
        ranks[name] = b.shape[1]
    config = json.loads((adapter.path / CONFIG_FILE).read_text(encoding="utf-8"))
    highest = max(ranks.values())
    lower = {name: r for name, r in ranks.items() if r != highest}
    config |= {"r": highest, "lora_alpha": highest, "use_rslora": False, "rank_pattern": lower, "alpha_pattern": lower}
    with written_atomically(output, CONFIG_FILE, force=force) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Path(output)


def best_of_rank(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B' [d_out, r], A' [r, d_in] in fp64 with B' A' the truncated SVD of B A, r at most ``rank``.

    By QR of both factors, so that no d_out × d_in matrix is formed. The singular values are shared evenly.
    """
    left, left_core = torch.linalg.qr(b.double())
    right, right_core = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return left @ u[:, :kept] * root, root[:, None] * (v[:kept] @ right.T)
