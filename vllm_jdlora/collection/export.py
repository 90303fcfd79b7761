"""A compressed adapter as an ordinary PEFT adapter of rank R: A = V_k, B = U_k Σ_i, s = 1."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from vllm_jdlora.adapter import WEIGHTS_FILE
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE


def export_adapter(
    collection: Collection, name: str, output: Path, *, dtype: str = "fp32", force: bool = False
) -> Path:
    """Write a PEFT folder whose ΔW equals U Σ V of the compressed adapter; slices without Σ are left out.

    Raises:
        JDLoRAError: no compressed adapter of that name, nothing in it, or ``output`` cannot be written.
    """
    manifest = collection.manifest
    if name in {entry.name for entry in manifest.plain}:
        raise JDLoRAError(f"{name} is kept uncompressed: copy {collection.plain_path(name)}")
    row = collection.index_of(name)
    cluster = manifest.adapters[row].cluster
    sigma = collection.matrices(row).float()
    tensors = {}
    targets = set()
    for i, part in enumerate(manifest.slices):
        if not bool(sigma[i].any()):
            continue
        u, v = (side[0].float() for side in collection.basis(part.name, [cluster]))
        key = f"base_model.model.{part.name}"
        tensors[f"{key}.lora_A.weight"] = v.to(TORCH_DTYPES[dtype]).contiguous()
        tensors[f"{key}.lora_B.weight"] = (u @ sigma[i]).to(TORCH_DTYPES[dtype]).contiguous()
        targets.add(part.name)
    if not tensors:
        raise JDLoRAError(f"{collection.path}: {name} has no weights to export")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": manifest.base_model.name,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": manifest.rank,
        "lora_alpha": manifest.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _target_modules(targets, {s.name for s in manifest.slices}),
    }
    with written_atomically(output, CONFIG_FILE, force=force) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Path(output)


def _target_modules(targets: set[str], known: set[str]) -> list[str]:
    """Suffixes where they mean exactly these modules, full paths otherwise (PEFT would add fresh layers)."""
    suffixes = {name.rpartition(".")[2] for name in targets}
    matched = {name for name in known if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if matched == targets else targets)
