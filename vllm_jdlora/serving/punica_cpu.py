"""The punica wrapper for CPU: plans a step once, then runs the grouped kernel for each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_jdlora.kernels.cpu_grouped import PackedLinear, TokenGroups
from vllm_jdlora.kernels.cpu_layout import Form
from vllm_jdlora.serving.punica import JDPunica, LayerPunica, define_operator, layer_of

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
    ):
        """dtype: of the model. Bases are kept in it, and in fp32 for a model in fp16, which the kernel has not."""
        super().__init__(max_num_batched_tokens, max_batches, device, forward_context_layers)
        self._form = Form.here(torch.float32 if dtype == torch.float16 else dtype)
        self.groups = TokenGroups.plan(_NO_TOKENS, _NO_TOKENS)

    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Plan the step: base slot and scaling slot of each token, int64 [T] each; −1 for none."""
        self.groups = TokenGroups.plan(token_base, token_slot)

    def _wrapper(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunicaCPU:
        return LayerPunicaCPU(self, name, layer, sigma, self._form)


class LayerPunicaCPU(LayerPunica):
    """Owns the layer's bases, laid out as the kernel reads them."""

    _shared: JDPunicaCPU

    def __init__(self, shared: JDPunicaCPU, name: str, layer: Any, sigma: torch.Tensor, form: Form):
        super().__init__(shared, name)
        self._packed = _take_over(layer, sigma, form)

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
        torch.ops.vllm_jdlora.linear_cpu_(y, x, self.name)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        groups = self._shared.groups
        if groups.empty:
            return
        if x.shape[0] != groups.num_tokens:
            raise RuntimeError(f"the LoRA plan is for {groups.num_tokens} tokens and the layer got {x.shape[0]}")
        if y.dtype == self._packed.form.stored:
            self._packed.add_(y, x, groups)
        else:
            wide = y.float()
            self._packed.add_(wide, x.float(), groups)
            y.copy_(wide)


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
    layer.lora_a_stacked = tuple(stage.expand(slots, 1, *stage.shape) for stage in v)
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
        packed.write(index, u, v)

    layer.set_lora, layer.reset_lora = set_lora, reset_lora
    return packed


def _linear_cpu_(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    layer_of(layer).run(y, x)


define_operator("linear_cpu_(Tensor(a!) y, Tensor x, str layer) -> ()", _linear_cpu_, "CPU")
