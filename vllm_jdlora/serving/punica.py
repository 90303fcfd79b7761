"""What stands between vLLM's LoRA layers and the kernels: who is in the batch, and each layer's own view of Σ.

A layer reaches its kernels through operators that torch.compile does not look into, so that vLLM can compile the model
around them. An operator finds the layer by name in vLLM's forward context, as attention does, or is handed a tensor of
the layer's: compiled code that vLLM caches on disk is then right for any engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from vllm_jdlora.collection.io import QuantizedBasis


class JDPunica(PunicaWrapperBase):
    """A punica wrapper that knows scaling slots; one for the whole model: what a step's layers share.

    vLLM's own metadata is not made: its loop over tokens takes milliseconds for a long prefill, and its only readers
    are embedding, logits and expert layers, which are refused at start-up.

    Attributes:
        sigma_by_columns: whether the kernels read Σ column by column in memory.
        sigma_dtype: that the kernels read Σ in; None: that of vLLM's LoRA buffers.
    """

    sigma_by_columns = False
    sigma_dtype: torch.dtype | None = None

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        forward_context_layers: dict[str, Any],
    ):
        """
        Args:
            max_num_batched_tokens: most tokens of a step.
            max_batches: most sequences of a step.
            device: of the tensors.
            forward_context_layers: vLLM's register of layers by name; each of ours is entered.
        """
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._forward_context_layers = forward_context_layers

    @abstractmethod
    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Take the base slot and the scaling slot of each token of the step, int64 [tokens] each; −1 for none.

        Base k is cluster k; behind the clusters come the slots of plain adapters, in vLLM's order. Called
        again whenever the step, a base or the content of a scaling slot has changed, and only then.
        """

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunica:
        """The wrapper that one LoRA layer gets through ``set_mapping``.

        vLLM hands every layer the same wrapper and no layer knows its place in the model, but Σ differs from layer
        to layer: so each layer gets one of its own, with its rows ``sigma`` [slots, slices, R, R], or of diagonals
        [slots, slices, R], of the Σ buffer.
        """
        wrapper = self._wrapper(f"{name}.jdlora", layer, sigma)
        self._forward_context_layers[wrapper.name] = wrapper
        return wrapper

    @abstractmethod
    def _wrapper(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunica:
        """The same, not yet entered under its name in the forward context."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("steps are planned by update_tokens")

    def _unreachable(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this LoRA layer should have been refused at start-up: only linear layers are served")

    add_shrink = add_expand = add_lora_linear = _unreachable
    add_lora_embedding = add_lora_logits = apply_lora_full_linear = _unreachable


class LayerPunica:
    """The wrapper that one layer sees; what it does not do itself is done, or refused, by the one for the model."""

    def __init__(self, shared: JDPunica, name: str):
        """name: the layer's in the forward context."""
        self._shared = shared
        self.name = name

    @abstractmethod
    def load_8_bits(self, layer: Any, parts: Sequence[QuantizedBasis | None], slot: int) -> None:
        """Put one cluster of this layer into a row of its buffers of 8 bits: see `eight_bit_loading.load_cluster`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)


def layer_of(name: str) -> Any:
    """The layer's wrapper in the step that runs."""
    return get_forward_context().no_compile_layers[name]


NAMESPACE = "vllm_jdlora"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_operator(schema: str, function: Callable[..., None], *devices: str) -> None:
    """``torch.ops.vllm_jdlora.NAME`` of this schema, which changes its first tensor and returns nothing.

    torch.library.custom_op would add tens of microseconds of Python to each of hundreds of calls in an eager step.
    """
    name = declare_operator(schema)
    for device in devices:
        _library.impl(name, function, device)


def declare_operator(schema: str) -> str:
    """The same without a function that does it: it is given elsewhere. Returns NAME."""
    name = schema.partition("(")[0]
    _library.define(schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=_library)
    return name


def _fake(*args: Any) -> None:
    """What torch.compile sees: the first tensor is mutated, nothing is returned."""
