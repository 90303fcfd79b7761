"""What stands between vLLM's LoRA layers and the kernels: who is in the batch, and each layer's own view of Σ."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch


class JDPunica(Protocol):
    """A punica wrapper that knows scaling slots; one for the whole model. Implemented for CPU and for CUDA.

    vLLM's ``update_metadata`` is never called on it.
    """

    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Take the base slot and the scaling slot of each token of the step, int64 [tokens] each; −1 for none.

        Base k is cluster k; behind the clusters come the slots of plain adapters, in vLLM's order. Called
        again whenever the step, a base or the content of a scaling slot has changed, and only then.
        """

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> Any:
        """The wrapper that one LoRA layer gets through ``set_mapping``.

        vLLM hands every layer the same wrapper and no layer knows its place in the model, but Σ differs from layer
        to layer: so each layer gets one of its own, with its rows ``sigma`` [slots, slices, R, R] of the Σ buffer.
        """
