"""The punica wrapper for CUDA: plans a step once, then launches the Triton kernels for each layer.

Kernels see *bases* (clusters and plain adapters), so grids grow with clusters and not with adapters. All launches of a
layer are behind its operators, so a CUDA graph holds all of them or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm import envs

from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.kernels.eight_bit_bases import WidenedBases
from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.token_tiles import TokenTiles
from vllm_jdlora.kernels.triton_grouped import GroupedLoRA
from vllm_jdlora.serving.eight_bit_loading import load_cluster
from vllm_jdlora.serving.punica import JDPunica, LayerPunica, define_operator, layer_of


class JDPunicaGPU(JDPunica):
    """The plan lies on the device, at the same place for every step; beside it the scratch that layers share."""

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        bases: int,
        forward_context_layers: dict[str, Any],
        eight_bit: tuple[int, torch.dtype] | None = None,
    ):
        """
        Args:
            max_num_batched_tokens: most tokens of a step.
            max_batches: most sequences of a step.
            device: a GPU.
            bases: clusters and slots of plain adapters.
            forward_context_layers: vLLM's register of layers by name; each of ours enters itself.
            eight_bit: how many clusters each layer keeps in 8 bits, before the bases of vLLM's buffers, and the type.

        Raises:
            JDLoRAError: there is no Triton.
        """
        super().__init__(max_num_batched_tokens, max_batches, device, forward_context_layers)
        self._eight_bit = eight_bit
        # vLLM's switch asks for equal bits of a request whatever else is served beside it.
        self.kernels = GroupedLoRA(TokenTiles(max_num_batched_tokens, bases, device), device, envs.VLLM_BATCH_INVARIANT)

    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Plan the step; what a CUDA graph reads behind its tokens becomes −1.

        Args:
            token_base: int64 [tokens], slot of the token's base; −1 for the base model.
            token_slot: int64 [tokens], its scaling slot; −1 for the base model.

        Raises:
            JDLoRAError: more tokens than ``max_num_batched_tokens``.
        """
        self.kernels.tiles.plan(token_base, token_slot)

    def _wrapper(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunicaGPU:
        bases = None
        if self._eight_bit is not None:
            bases = WidenedBases.beside(layer.lora_a_stacked, layer.lora_b_stacked, *self._eight_bit)
        return LayerPunicaGPU(self, name, layer, sigma, bases)


class LayerPunicaGPU(LayerPunica):
    """Owns the tables through which kernels find the layer's bases, and the bases of 8 bits, which vLLM knows nothing
    of."""

    def __init__(
        self, shared: JDPunicaGPU, name: str, layer: Any, sigma: torch.Tensor, eight_bit: WidenedBases | None = None
    ):
        super().__init__(shared, name)
        self.kernels, self.sigma = shared.kernels, sigma
        self.module = PackedModule.of(layer.lora_a_stacked, layer.lora_b_stacked, eight_bit)
        self.kernels.reserve(self.module)

    def load_8_bits(self, layer: Any, parts: Sequence[QuantizedBasis | None], slot: int) -> None:
        assert self.module.eight_bit is not None
        load_cluster(layer, self.module.eight_bit, parts, slot)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y += U Σ V x``; ``scale`` is 1 in every caller, adapters' scalings are folded into Σ.

        ``add_inputs=False`` (vLLM's dual-stream mode, which hands in zeros) writes over the rows with an adapter.
        """
        torch.ops.vllm_jdlora.linear_gpu_(y, x, self.name, add_inputs)

    def add_shrink(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """``y[i] = V[i] x`` by sorted row, for layers that gather y before the expand (``--fully-sharded-loras``)."""
        torch.ops.vllm_jdlora.shrink_gpu_(y, x, self.name)

    def add_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y += U Σ x`` for what :meth:`add_shrink` made. Σ mixes the components of x, so it follows the gather."""
        torch.ops.vllm_jdlora.expand_gpu_(y, x, self.name, offset_start, add_inputs)


def _linear_gpu_(y: torch.Tensor, x: torch.Tensor, layer: str, add_inputs: bool) -> None:
    owner = layer_of(layer)
    owner.kernels.linear_(_rows(y), _rows(x), owner.module, owner.sigma, add_inputs)


def _shrink_gpu_(h: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    owner = layer_of(layer)
    owner.kernels.shrink_(h, _rows(x), owner.module)


def _expand_gpu_(y: torch.Tensor, h: torch.Tensor, layer: str, first_column: int, add_inputs: bool) -> None:
    owner = layer_of(layer)
    owner.kernels.expand_(_rows(y), h, owner.module, owner.sigma, first_column, add_inputs)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[T, columns]; some models put a batch axis of 1 in front."""
    return tensor.view(-1, tensor.shape[-1])


# On the CPU they run in Triton's interpreter.
_DEVICES = ("CUDA", "CPU")
define_operator("linear_gpu_(Tensor(a!) y, Tensor x, str layer, bool add_inputs) -> ()", _linear_gpu_, *_DEVICES)
define_operator("shrink_gpu_(Tensor(a!) h, Tensor x, str layer) -> ()", _shrink_gpu_, *_DEVICES)
define_operator(
    "expand_gpu_(Tensor(a!) y, Tensor h, str layer, int first_column, bool add_inputs) -> ()", _expand_gpu_, *_DEVICES
)
