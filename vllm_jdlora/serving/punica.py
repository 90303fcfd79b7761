"""What stands between vLLM's LoRA layers and the kernels: who is in the batch, and each layer's own view of Σ."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch


class JDPunica(Protocol):
    """A punica wrapper that knows scaling slots; one for the whole model. Implemented for CPU and for CUDA."""

    def update_scaling_slots(self, token_slots: np.ndarray) -> None:
        """Take the scaling slot of each token of the step, int32 [tokens]; −1 is the base model.

        Called after vLLM's ``update_metadata``, which brings the base slot of each token, and again whenever the
        content of a slot has changed.
        """

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> Any:
        """The wrapper that one LoRA layer gets through ``set_mapping``.

        vLLM hands every layer the same wrapper and no layer knows its place in the model, but Σ differs from layer
        to layer: so each layer gets one of its own, with its rows ``sigma`` [slots, slices, R, R] of the Σ buffer.
        """


class JDLayerPunica:
    """One layer's wrapper in front of a shared one that takes Σ as an argument (``jd_linear``, ``jd_expand``)."""

    def __init__(self, shared: Any, sigma: torch.Tensor):
        self._shared = shared
        self.sigma = sigma

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)

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
        self._shared.jd_linear(y, x, lora_a_stacked, lora_b_stacked, self.sigma, output_slices, **kwargs)

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
        """``y += U Σ h``, where the layer gathered h between shrink and expand (``--fully-sharded-loras``)."""
        self._shared.jd_expand(
            y, x, lora_b_stacked, self.sigma, output_slices, offset_start=offset_start, add_inputs=add_inputs
        )
