"""Where each slice of a collection belongs in the model, and whether it fits there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from vllm_jdlora.collection.schema import CollectionManifest
from vllm_jdlora.errors import JDLoRAError


@dataclass(frozen=True)
class ModuleSlices:
    """The rows of the worker's Σ buffer: one for each output slice of each wrapped module, in the modules' order.

    Attributes:
        rows: number of rows.
        targets: the model's name of each slice (q_proj, not the packed qkv_proj) → its name in the collection.
        order: int64 [covered rows], the slice index in the collection for each covered row.
        covered: int64 [covered rows], the rows that the collection fills; the others stay zero.
    """

    rows: int
    targets: dict[str, str]
    order: torch.Tensor
    covered: torch.Tensor
    _offsets: dict[str, tuple[int, int]]

    def rows_of(self, module: str) -> slice:
        start, stop = self._offsets[module]
        return slice(start, stop)

    @classmethod
    def of(cls, manager: Any, manifest: CollectionManifest) -> ModuleSlices:
        """Match the collection's slices with the modules that ``manager`` (a LoRAModelManager) has wrapped.

        Raises:
            JDLoRAError: a slice has no wrapped module, or another size there.
        """
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        in_model = {
            parse_fine_tuned_lora_name(f"base_model.model.{s.name}.lora_A.weight", mapper)[0]: i
            for i, s in enumerate(manifest.slices)
        }
        order: list[int] = []
        covered: list[int] = []
        offsets: dict[str, tuple[int, int]] = {}
        targets: dict[str, str] = {}
        row = 0
        for name, module in manager.modules.items():
            parts = manager.packed_modules.get(name) or [name]
            slices = module.n_slices
            if len(parts) not in (1, slices):
                raise JDLoRAError(f"{name} has {slices} slices for {len(parts)} targets; this layout is not served")
            for i in range(slices):
                part = parts[i if len(parts) > 1 else 0]
                if (index := in_model.get(part)) is None:
                    continue
                targets[part] = manifest.slices[index].name
                order.append(index)
                covered.append(row + i)
            for i, part in enumerate(parts):
                if part in in_model:
                    # Phi-3 has q, k and v in one matrix, and its adapters do.
                    _check_size(name, module, None if len(parts) == 1 else i, manifest.slices[in_model[part]])
            offsets[name] = (row, row + slices)
            row += slices
        if missing := sorted(set(in_model) - set(targets)):
            raise JDLoRAError(
                f"the model has no LoRA layer for {len(missing)} of the collection's slices, first {missing[0]}: "
                "the collection belongs to another model, or this module cannot carry LoRA in vLLM"
            )
        return cls(row, targets, torch.tensor(order), torch.tensor(covered), offsets)


def _check_size(name: str, module: Any, part: int | None, shape: Any) -> None:
    """vLLM copies a smaller matrix into the corner of its buffer without a word; here it is an error."""
    base = module.base_layer
    d_in = base.input_size
    outputs = _output_sizes(base)
    d_out = sum(outputs) if part is None or len(outputs) == 1 else outputs[part]
    if (shape.d_out, shape.d_in) != (d_out, d_in):
        raise JDLoRAError(
            f"{shape.name} is {shape.d_out} x {shape.d_in} in the collection and {d_out} x {d_in} in the model "
            f"({name}): the collection was made for another base model"
        )


def _output_sizes(base: Any) -> list[int]:
    """Unsharded output size of each part of a linear layer."""
    if isinstance(base, QKVParallelLinear):
        value_head = getattr(base, "v_head_size", base.head_size)
        return [
            base.total_num_heads * base.head_size,
            base.total_num_kv_heads * base.head_size,
            base.total_num_kv_heads * value_head,
        ]
    if isinstance(base, RowParallelLinear):
        return [base.output_size]
    return list(getattr(base, "output_sizes", None) or [base.output_size])
