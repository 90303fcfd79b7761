"""The punica wrapper for CPU: plans a step once, then runs the grouped kernel for each layer."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.kernels import cpu_operator
from vllm_jdlora.kernels.cpu_grouped import PackedLinear, TokenGroups
from vllm_jdlora.kernels.cpu_layout import Form
from vllm_jdlora.kernels.eight_bit_bases import EightBitBases
from vllm_jdlora.serving.eight_bit_loading import load_cluster
from vllm_jdlora.serving.options import IN_PYTHON
from vllm_jdlora.serving.punica import NAMESPACE, JDPunica, LayerPunica, declare_operator, define_operator, layer_of

logger = logging.getLogger("vllm.jdlora")

_NO_TOKENS = np.empty(0, dtype=np.int64)


class JDPunicaCPU(JDPunica):
    """The plan is tiles of tokens for each thread.

    vLLM's own CPU wrapper gathers a whole LoRA matrix for each token, and on 0.32 takes the base model's −1 for the
    last slot; nothing of it is used here.
    """

    sigma_by_columns = True

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        forward_context_layers: dict[str, Any],
        dtype: torch.dtype,
        eight_bit: tuple[int, torch.dtype] | None = None,
    ):
        """
        Args:
            dtype: of the model. Bases and Σ are kept in it, and in fp32 for a model in fp16, which the kernel has not.
            eight_bit: how many clusters each layer keeps in 8 bits, before the bases of vLLM's slots, and the type.
        """
        super().__init__(max_num_batched_tokens, max_batches, device, forward_context_layers)
        self.sigma_dtype = self._dtype = torch.float32 if dtype == torch.float16 else dtype
        self._eight_bit = eight_bit
        self.groups = self.eight_bit_groups = TokenGroups.plan(_NO_TOKENS, _NO_TOKENS)
        # A model in fp16 is widened for the kernel, layer by layer, in Python.
        self._step = cpu_operator.Step() if dtype != torch.float16 and _compiled_operator() else None

    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Plan the step: base slot and scaling slot of each token, int64 [T] each; −1 for none."""
        first = self._eight_bit[0] if self._eight_bit else 0
        self.groups = TokenGroups.plan(token_base - first, token_slot)
        if first:
            self.eight_bit_groups = TokenGroups.plan(np.where(token_base < first, token_base, -1), token_slot)
        if self._step is not None:
            self._step.take(self.groups, self.eight_bit_groups)

    def _wrapper(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunicaCPU:
        packed = _take_over(layer, sigma, Form.here(self._dtype))
        eight_bit = None
        if self._eight_bit is not None:
            clusters, stored = self._eight_bit
            form = Form.here(self._dtype, stored)
            eight_bit = PackedLinear(packed.widths, packed.d_in, packed.rank, clusters, form, sigma)
        call = None if self._step is None else cpu_operator.LayerCall(self._step, packed, eight_bit)
        return LayerPunicaCPU(self, name, packed, eight_bit, call)


class LayerPunicaCPU(LayerPunica):
    """Owns the layer's bases, laid out as the kernel reads them, and those of 8 bits, which vLLM knows nothing of."""

    _shared: JDPunicaCPU

    def __init__(
        self,
        shared: JDPunicaCPU,
        name: str,
        packed: PackedLinear,
        eight_bit: PackedLinear | None,
        call: cpu_operator.LayerCall | None,
    ):
        """call: where the compiled operator does it."""
        super().__init__(shared, name)
        self._packed, self._eight_bit = packed, eight_bit
        self._handle = None if call is None else call.handle

    def load_8_bits(self, layer: Any, parts: Sequence[QuantizedBasis | None], slot: int) -> None:
        assert self._eight_bit is not None and self._eight_bit.form.eight_bit is not None
        one = EightBitBases.beside(layer.lora_a_stacked, layer.lora_b_stacked, 1, self._eight_bit.form.eight_bit)
        load_cluster(layer, one, parts, 0)
        self._eight_bit.write_8_bits(slot, one)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """``y += U Σ V x``; ``scale`` is 1 in every caller, adapters' scalings are folded into Σ."""
        if self._handle is None:
            torch.ops.vllm_jdlora.linear_cpu_(y, x, self.name)
        else:
            torch.ops.vllm_jdlora.compiled_linear_cpu_(y, x, self._handle)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        groups, eight_bit_groups = self._shared.groups, self._shared.eight_bit_groups
        if groups.empty and eight_bit_groups.empty:
            return
        if x.shape[0] != groups.num_tokens:
            raise RuntimeError(f"the LoRA plan is for {groups.num_tokens} tokens and the layer got {x.shape[0]}")
        stored = self._packed.form.stored
        wide_y, wide_x = y.to(stored), x.to(stored)  # themselves but for fp16
        self._packed.add_(wide_y, wide_x, groups)
        if self._eight_bit is not None:
            self._eight_bit.add_(wide_y, wide_x, eight_bit_groups)
        if wide_y is not y:
            y.copy_(wide_y)


def _take_over(layer: Any, sigma: torch.Tensor, form: Form) -> PackedLinear:
    """The layer's bases in the kernel's layout; vLLM goes on writing them slot by slot through `set_lora`.

    The layout is no view of [d_out, R] and [R, d_in]: vLLM writes one slot into a stage that stands for all of them,
    and it is laid down from there.
    """
    old_a, old_b = layer.lora_a_stacked, layer.lora_b_stacked
    slots, _, rank, d_in = old_a[0].shape
    packed = PackedLinear([b.shape[2] for b in old_b], d_in, rank, slots, form, sigma)
    v = [torch.zeros_like(a[0, 0]) for a in old_a]
    u = [torch.zeros_like(b[0, 0]) for b in old_b]
    layer.lora_a_stacked = ours = tuple(stage.expand(slots, 1, *stage.shape) for stage in v)
    layer.lora_b_stacked = tuple(stage.expand(slots, 1, *stage.shape) for stage in u)

    clear, write = layer.reset_lora, layer.set_lora

    def reset_lora(index: int) -> None:
        clear(index)
        packed.write(index, u, v)

    def set_lora(index: int, *args: Any, **kwargs: Any) -> None:
        layer.reset_lora = clear  # vLLM clears a slot before it writes it: what comes between need not be laid down
        try:
            write(index, *args, **kwargs)
        finally:
            layer.reset_lora = reset_lora
        if layer.lora_a_stacked is ours:  # and not a cluster's of 8 bits meanwhile
            packed.write(index, u, v)

    layer.set_lora, layer.reset_lora = set_lora, reset_lora
    return packed


def _linear_cpu_(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    layer_of(layer).run(y, x)


@lru_cache(maxsize=1)
def _compiled_operator() -> bool:
    """Whether there is the operator that needs no Python; made when the first engine asks."""
    if os.environ.get(IN_PYTHON):
        return False
    if not cpu_operator.available():
        logger.warning("torch %s has no interface for compiled operators: Python calls the layers", torch.__version__)
        return False
    cpu_operator.implement(NAMESPACE, _COMPILED)
    return True


_COMPILED = declare_operator("compiled_linear_cpu_(Tensor(a!) y, Tensor x, Tensor handle) -> ()")
define_operator("linear_cpu_(Tensor(a!) y, Tensor x, str layer) -> ()", _linear_cpu_, "CPU")
