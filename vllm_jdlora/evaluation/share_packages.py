"""The "share" packages `vlora-dev` and `lorashare` as variants, through their public interfaces alone.

Both are given PEFT folders in fp32 with the scale s folded into B (s = 1), and what they save is counted. Neither
takes adapters of different ranks or targets.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, read_adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.variant import Update, Variant
from vllm_jdlora.peft_config import CONFIG_FILE

_BYTES_A_NUMBER = 2


def vlora_variant(adapters: Sequence[Adapter], budget: int) -> Variant:
    """vLoRA: one PCA, centred, of whole flattened factors; a few coefficients for each adapter and side.

    `num_components` is the largest whose saved subspace has at most `budget` numbers (2 bytes each: it is cast to
    bf16 by its own `to`). Raises JDLoRAError if the package is missing or the budget holds no component.
    """
    try:
        from vlora import SharedSubspace, load_adapter
    except ImportError as error:
        raise _missing("vlora", "vlora-dev") from error
    rank, sides = _common(adapters, "vlora")
    # The mean and each component are as large as one adapter; each component adds a singular value and a coefficient
    # for each adapter, on both sides of each slice.
    one_adapter, one_value = rank * sum(sides), 2 * len(sides)

    def numbers(components: int) -> int:
        return (components + 1) * one_adapter + components * one_value * (1 + len(adapters))

    components = _most(numbers, budget, len(adapters), "vlora")
    with _peft_folders(adapters) as folders, TemporaryDirectory() as saved, _quiet():
        subspace = SharedSubspace.from_adapters(
            [load_adapter(folder) for folder in folders],
            task_ids=[adapter.name for adapter in adapters],
            num_components=components,
        ).to(dtype=torch.bfloat16)
        subspace.save(saved)
        stored = _checked(_stored_numbers(Path(saved)), budget, "vlora")
        subspace.to(dtype=torch.float32)  # the products in fp32, of values rounded to bf16
        kept: dict[str, Any] = {adapter.name: subspace.reconstruct(adapter.name) for adapter in adapters}
    updates = {
        name: {part: (weights.lora_b[part], weights.lora_a[part]) for part in weights.layer_names}
        for name, weights in kept.items()
    }
    return Variant("vlora", _BYTES_A_NUMBER * stored, _rounded(updates))


def lorashare_variant(adapters: Sequence[Adapter], budget: int) -> Variant:
    """lorashare (Share, 2602.06043): PCA of all rows of A and of all columns of B, K × ρ coefficients for each side.

    `num_components` is the largest whose checkpoint has at most `budget` numbers. It saves fp32; here its numbers
    count 2 bytes and what it gives back is rounded to bf16, as for all others. Raises JDLoRAError if the package is
    missing, the budget holds no component or there is one adapter only.
    """
    try:
        from lorashare import SHAREModel
    except ImportError as error:
        raise _missing("lorashare", "lorashare") from error
    rank, sides = _common(adapters, "lorashare")
    if len(adapters) < 2:
        raise JDLoRAError("lorashare: shares between adapters, give it two at least")
    narrow = min(min(part.shape.d_out, part.shape.d_in) for part in adapters[0].slices.values())

    def numbers(components: int) -> int:
        return components * (sum(sides) + 2 * rank * len(sides) * len(adapters))

    components = _most(numbers, budget, narrow, "lorashare")
    with _peft_folders(adapters) as folders, TemporaryDirectory() as saved, _quiet():
        share = SHAREModel.from_adapters(
            {adapter.name: str(folder) for adapter, folder in zip(adapters, folders, strict=True)},
            num_components=components,
            device="cpu",
        )
        share.save_pretrained(saved)
        stored = _checked(_stored_numbers(Path(saved)), budget, "lorashare")
        updates = {}
        for adapter in adapters:
            given_back = Path(saved) / "reconstructed" / adapter.name
            share.reconstruct(adapter.name, output_dir=given_back)
            updates[adapter.name] = _read(given_back, adapter.name)
    return Variant("lorashare", _BYTES_A_NUMBER * stored, _rounded(updates))


def _missing(module: str, package: str) -> JDLoRAError:
    return JDLoRAError(f"the baseline {module} needs the package {package}: pip install 'vllm-jdlora[evaluate]'")


def _common(adapters: Sequence[Adapter], package: str) -> tuple[int, list[int]]:
    """(ρ, [d_out + d_in of each slice]) of adapters that all have the same. Raises JDLoRAError if they do not."""
    if not adapters:
        raise JDLoRAError(f"{package}: give it at least one adapter")
    layouts = {tuple(sorted((part, s.rank) for part, s in adapter.slices.items())) for adapter in adapters}
    ranks = {s.rank for adapter in adapters for s in adapter.slices.values()}
    if len(layouts) > 1 or len(ranks) > 1:
        raise JDLoRAError(f"{package}: takes adapters of one rank and the same target modules only; leave it out")
    return ranks.pop(), [s.shape.d_out + s.shape.d_in for s in adapters[0].slices.values()]


def _most(numbers: Callable[[int], int], budget: int, most: int, package: str) -> int:
    if numbers(1) > budget:
        raise JDLoRAError(
            f"{package}: one component takes {_BYTES_A_NUMBER * numbers(1)} bytes, more than the "
            f"{_BYTES_A_NUMBER * budget} allowed; give it more"
        )
    return max(k for k in range(1, most + 1) if numbers(k) <= budget)


def _checked(stored: int, budget: int, package: str) -> int:
    if stored > budget:
        raise JDLoRAError(f"{package}: saved {stored} numbers, more than the {budget} allowed: another version of it?")
    return stored


@contextmanager
def _peft_folders(adapters: Sequence[Adapter]) -> Iterator[list[Path]]:
    with TemporaryDirectory() as root:
        folders = []
        for adapter in adapters:
            folder = Path(root) / adapter.name
            folder.mkdir()
            tensors = {}
            for part in adapter.slices:
                pair = adapter.factors(part)
                assert pair is not None
                tensors[f"base_model.model.{part}.lora_B.weight"] = pair[0].contiguous()
                tensors[f"base_model.model.{part}.lora_A.weight"] = pair[1].contiguous()
            save_file(tensors, folder / WEIGHTS_FILE)
            config = {
                "peft_type": "LORA",
                "base_model_name_or_path": adapter.base_model or "",
                "r": adapter.rank,
                "lora_alpha": adapter.rank,
                "target_modules": sorted({part.rpartition(".")[2] for part in adapter.slices}),
            }
            (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
            folders.append(folder)
        yield folders


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stored_numbers(folder: Path) -> int:
    """How many values the safetensors files below the folder hold."""
    total = 0
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for extent in tensors.get_slice(key).get_shape():
                    size *= extent
                total += size
    return total


def _read(folder: Path, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    adapter = read_adapter(folder, name)
    pairs = ((part, adapter.factors(part)) for part in adapter.slices)
    return {part: pair for part, pair in pairs if pair is not None}


def _rounded(updates: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> Callable[[str], Update]:
    """Factors held in bf16, given out in fp32."""
    kept = {
        name: {part: (b.bfloat16(), a.bfloat16()) for part, (b, a) in parts.items()} for name, parts in updates.items()
    }
    return lambda name: {part: (b.float(), a.float()) for part, (b, a) in kept[name].items()}
