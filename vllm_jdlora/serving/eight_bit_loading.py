"""Brings a quantised collection's bases into a layer's 8-bit buffers, sliced as vLLM slices LoRA weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.kernels.eight_bit_bases import EightBitBases


def load_cluster(layer: Any, bases: EightBitBases, parts: Sequence[QuantizedBasis | None], slot: int) -> None:
    """Put one cluster of one LoRA layer into a row of its buffers.

    Args:
        layer: vLLM's LoRA layer; its ``set_lora`` cuts what this worker gets under tensor parallelism.
        bases: the layer's buffers.
        parts: the cluster's, for each output slice of the layer, or one for all of them; None where the collection has
            nothing.
        slot: the row.
    """
    if not any(parts):
        return
    each = list(parts) * (layer.n_slices if len(parts) == 1 else 1)
    with _stacks(layer, bases):
        v = [None if part is None else _bits(part.v) for part in parts]
        u = [None if part is None else _bits(part.u) for part in parts]
        layer.set_lora(slot, *((v[0], u[0]) if len(parts) == 1 else (v, u)))
    for i, part in enumerate(each):
        if part is not None:
            bases.set_scales(slot, i, _of_this_worker(layer, bases, part.v_scale), part.u_scale)


@contextmanager
def _stacks(layer: Any, bases: EightBitBases) -> Iterator[None]:
    """The layer's buffers are those of 8 bits for a while. As int8: not every operation knows fp8."""
    wide = layer.lora_a_stacked, layer.lora_b_stacked
    layer.lora_a_stacked, layer.lora_b_stacked = (tuple(map(_bits, stack)) for stack in (bases.v, bases.u))
    try:
        yield
    finally:
        layer.lora_a_stacked, layer.lora_b_stacked = wide


def _of_this_worker(layer: Any, bases: EightBitBases, scale: torch.Tensor) -> torch.Tensor:
    """Scales of the rows of V that this worker has: fully sharded layers split them, in the width of the buffers."""
    rows, rank = bases.v_scale.shape[2], bases.u_scale.shape[2]
    first = layer.tp_rank * rows if rows < rank else 0
    return scale[first : first + rows]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int8)
