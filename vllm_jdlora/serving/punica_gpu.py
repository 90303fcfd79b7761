"""The punica wrapper for CUDA: plans a step once, then launches the Triton kernels for each layer.

Kernels see *bases* (clusters and plain adapters), so grids grow with clusters and not with adapters. Each layer reaches
its kernels through operators that torch.compile does not look into and that find the layer by name in vLLM's forward
context, as attention does: compiled code that vLLM caches on disk is then right for any engine, and a CUDA graph holds
all launches of a layer or none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm import envs
from vllm.forward_context import get_forward_context
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from vllm_jdlora.kernels.eight_bit_bases import EightBitBases
from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.token_tiles import TokenTiles
from vllm_jdlora.kernels.triton_grouped import GroupedLoRA


class JDPunicaGPU(PunicaWrapperBase):
    """What a step's layers share: the plan of who is in the batch, and the scratch.

    vLLM's own metadata is not made: its loop over tokens takes milliseconds for a long prefill, and its only readers
    are embedding, logits and expert layers, which are refused at start-up.
    """

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
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._forward_context_layers = forward_context_layers
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

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunicaGPU:
        """The wrapper of one LoRA layer, with its rows of the Σ buffer [slots, slices, R, R]."""
        bases = None
        if self._eight_bit is not None:
            bases = EightBitBases.beside(layer.lora_a_stacked, layer.lora_b_stacked, *self._eight_bit)
        wrapper = LayerPunicaGPU(self, f"{name}.jdlora", layer, sigma, bases)
        self._forward_context_layers[wrapper.name] = wrapper
        return wrapper

    def _unreachable(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this LoRA layer should have been refused at start-up: only linear layers are served")

    update_metadata = add_shrink = add_expand = add_lora_linear = _unreachable
    add_lora_embedding = add_lora_logits = apply_lora_full_linear = _unreachable


class LayerPunicaGPU:
    """The wrapper that one layer sees; it owns the tables through which kernels find the layer's bases, and the bases
    of 8 bits, which vLLM knows nothing of."""

    def __init__(
        self, shared: JDPunicaGPU, name: str, layer: Any, sigma: torch.Tensor, eight_bit: EightBitBases | None = None
    ):
        self._shared = shared
        self.name = name
        self.sigma = sigma
        self.module = PackedModule.of(layer.lora_a_stacked, layer.lora_b_stacked, eight_bit)
        shared.kernels.reserve(self.module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

    @property
    def kernels(self) -> GroupedLoRA:
        return self._shared.kernels

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


def _layer(name: str) -> LayerPunicaGPU:
    layer: LayerPunicaGPU = get_forward_context().no_compile_layers[name]
    return layer


def _linear_gpu_(y: torch.Tensor, x: torch.Tensor, layer: str, add_inputs: bool) -> None:
    owner = _layer(layer)
    owner.kernels.linear_(_rows(y), _rows(x), owner.module, owner.sigma, add_inputs)


def _shrink_gpu_(h: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    owner = _layer(layer)
    owner.kernels.shrink_(h, _rows(x), owner.module)


def _expand_gpu_(y: torch.Tensor, h: torch.Tensor, layer: str, first_column: int, add_inputs: bool) -> None:
    owner = _layer(layer)
    owner.kernels.expand_(_rows(y), h, owner.module, owner.sigma, first_column, add_inputs)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[T, columns]; some models put a batch axis of 1 in front."""
    return tensor.view(-1, tensor.shape[-1])


def _fake(*args: Any) -> None:
    """What torch.compile sees: the first tensor is mutated, nothing is returned."""


# torch.library.custom_op would add tens of microseconds of Python to each of hundreds of calls in an eager step.
_library = torch.library.Library("vllm_jdlora", "FRAGMENT")
for _schema, _function in (
    ("linear_gpu_(Tensor(a!) y, Tensor x, str layer, bool add_inputs) -> ()", _linear_gpu_),
    ("shrink_gpu_(Tensor(a!) h, Tensor x, str layer) -> ()", _shrink_gpu_),
    ("expand_gpu_(Tensor(a!) y, Tensor h, str layer, int first_column, bool add_inputs) -> ()", _expand_gpu_),
):
    _library.define(_schema)
    _library.impl(_function.__name__.removeprefix("_"), _function, "CUDA")
    _library.impl(_function.__name__.removeprefix("_"), _function, "CPU")  # for Triton's interpreter
    _library._register_fake(_function.__name__.removeprefix("_"), _fake)
