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
