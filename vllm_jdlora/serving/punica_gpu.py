"""The punica wrapper for CUDA: vLLM's own shrink and expand, with the Σ kernel between them.

Shrink and expand see *bases* (clusters and plain adapters), so their grids grow with clusters and not with adapters;
the Σ kernel sees the scaling slot of each token. All three are ops that torch.compile does not look into, and all
three read the same flag to skip a step without adapters, so a CUDA graph holds either all of them or none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_gpu import HAS_TRITON, PunicaWrapperGPU

import vllm_jdlora.kernels.triton_sigma  # noqa: F401  (registers torch.ops.vllm_jdlora.sigma_)
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.punica import JDLayerPunica


class JDPunicaGPU(PunicaWrapperGPU):  # @final there is for type checkers only
    """vLLM's wrapper with base-sized metadata (``lora_config.max_loras`` counts bases), plus the scaling slots.

    Layers reach it through :class:`~vllm_jdlora.serving.punica.JDLayerPunica`, which adds the layer's view of Σ.
    ``add_shrink``, ``update_metadata`` and the rest are vLLM's.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any):
        if not HAS_TRITON:
            raise JDLoRAError("vLLM found no usable Triton, and LoRA on a GPU needs it: check `vllm collect-env`")
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        # CUDA graphs keep its address: filled in place, never replaced.
        self._token_slots = torch.full((max_num_batched_tokens,), -1, dtype=torch.int32, device=device)

    def update_scaling_slots(self, token_slots: np.ndarray) -> None:
        """Take the scaling slot of each token of the step; every row behind them becomes −1.

        The tail matters: a replayed graph runs on its padded token count.

        Args:
            token_slots: int [tokens], −1 for the base model.

        Raises:
            JDLoRAError: more tokens than ``max_num_batched_tokens``.
        """
        tokens, capacity = len(token_slots), len(self._token_slots)
        if tokens > capacity:
            raise JDLoRAError(f"{tokens} tokens in a step of at most {capacity}: raise --max-num-batched-tokens")
        # New pinned memory each step: torch's host allocator hands a block out again only after the copy from it has
        # run, whereas one buffer of our own could be overwritten while the previous step's copy is still queued.
        staged = torch.empty(capacity, dtype=torch.int32, pin_memory=self._token_slots.is_cuda)
        rows = staged.numpy()
        rows[:tokens] = token_slots
        rows[tokens:] = -1
        self._token_slots.copy_(staged, non_blocking=True)

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> JDLayerPunica:
        """The wrapper of one LoRA layer, with its rows of the Σ buffer [slots, slices, R, R]."""
        return JDLayerPunica(self, sigma)

    def jd_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        sigma: torch.Tensor,
        output_slices: tuple[int, ...],
        add_inputs: bool = True,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """``y += U Σ V x`` in place; rows without an adapter keep their bits.

        Args:
            y: fp16 or bf16 [T, sum of output_slices].
            x: [T, d_in], dtype of y.
            lora_a_stacked: for each slice V [bases, 1, R, d_in], dtype of y.
            lora_b_stacked: for each slice U [bases, 1, d_out, R], dtype of y.
            sigma: bf16, fp16 or fp32 [slots, slices, R, R] or [slots, slices, R].
            output_slices: d_out of each slice.
            add_inputs: False writes ``U Σ V x`` over y (vLLM's dual-stream mode hands in zeros).
            buffer: fp32 [slices, T, R] scratch; allocated here when absent, as vLLM does.
            **kwargs: what a later vLLM may add; passed on.
        """
        x = x.view(-1, x.shape[-1])
        if buffer is None:
            # Not initialised: shrink zeroes it, and expand reads no row without a base.
            rank = lora_b_stacked[0].size(-1)
            buffer = torch.empty((len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device)
        self.add_shrink(buffer, x, lora_a_stacked, 1.0, **kwargs)
        self.jd_expand(y, buffer, lora_b_stacked, sigma, output_slices, add_inputs=add_inputs, **kwargs)

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
        """``y += U Σ h`` in place, for layers that gather h between shrink and expand (``--fully-sharded-loras``).

        Σ mixes the components of h, so it cannot come before the gather. Overwrites h.

        Args:
            y: fp16 or bf16 [T, columns].
            h: fp32 [slices, T, R], contiguous.
            lora_b_stacked: for each slice U [bases, 1, d_out, R], dtype of y.
            sigma: bf16, fp16 or fp32 [slots, slices, R, R] or [slots, slices, R].
            output_slices: d_out of each slice.
            offset_start: first column of y that the first slice writes.
            add_inputs: False writes over y.
            **kwargs: passed on.
        """
        # Launched without PDL: it starts after shrink has ended, and an expand launched with PDL waits for its end.
        torch.ops.vllm_jdlora.sigma_(h, sigma, self._token_slots[: h.size(1)], self.token_mapping_meta.no_lora_flag_cpu)
        self.add_expand(y, h, lora_b_stacked, output_slices, offset_start=offset_start, add_inputs=add_inputs, **kwargs)

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: without the layer's Σ, stock would add ``U V x``, which is no adapter's.

        Raises:
            JDLoRAError: always.
        """
        raise JDLoRAError(
            "a LoRA layer called the wrapper without its scaling matrices: exclude it with --lora-target-modules"
        )
