"""What stands between vLLM's LoRA layers and the kernels: a layer's own view of Σ in front of the shared wrapper."""

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

    def jd_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        sigma: torch.Tensor,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """``y += U Σ V x`` in place.

        Args:
            y: [T, sum of output_slices].
            x: [T, d_in].
            lora_a_stacked: for each slice V [bases, 1, R, d_in].
            lora_b_stacked: for each slice U [bases, 1, d_out, R].
            sigma: [slots, slices, R, R].
        """

    def jd_expand(
        self,
        y: torch.Tensor,
        h: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        sigma: torch.Tensor,
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y += U Σ h`` in place, for layers that gather h [slices, T, R] between shrink and expand."""


class JDLayerPunica:
    """The wrapper that one LoRA layer sees: the shared one, with the layer's rows of the Σ buffer.

    vLLM hands every layer the same punica wrapper, and no layer knows its own place in the model; Σ differs from
    layer to layer, so each layer gets this in front (through its own ``set_mapping``).
    """

    def __init__(self, shared: Any, sigma: torch.Tensor):
        self._shared = shared
        self.sigma = sigma
        """[slots, slices of this layer, R, R], a view of the worker's Σ buffer."""

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
        # scale is 1 in every caller: adapters' scalings are folded into Σ.
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
        self._shared.jd_expand(
            y, x, lora_b_stacked, self.sigma, output_slices, offset_start=offset_start, add_inputs=add_inputs
        )
