"""The punica wrapper for CPU: plans a step once, then runs the grouped kernel for each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from vllm_jdlora.kernels.cpu_grouped import TokenGroups, jd_linear_

_NO_TOKENS = np.empty(0, dtype=np.int64)


class JDPunicaCPU(PunicaWrapperBase):
    """vLLM's CPU wrapper gathers a whole LoRA matrix for each token, and on 0.32 takes the base model's −1 for the
    last slot; nothing of it is used here."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str):
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._token_base = _NO_TOKENS
        self.groups = TokenGroups.plan(_NO_TOKENS, _NO_TOKENS)
        self._fused_v: dict[int, torch.Tensor] = {}

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Base slot of each token. The stock tensors (for embeddings, logits) have no reader here."""
        self._token_base = _slots_of(np.asarray(mapping.index_mapping, dtype=np.int64), lora_index_to_id)
        self.no_lora = not bool((self._token_base >= 0).any())

    def update_scaling_slots(self, token_slots: np.ndarray) -> None:
        self.groups = TokenGroups.plan(self._token_base, token_slots)

    def fuse_shrink(self, layer: Any) -> None:
        """Lay the V of a layer's slices in one tensor, so that shrink is one product for all slices.

        vLLM goes on writing through ``layer.lora_a_stacked``, which become views of it.
        """
        stacked = layer.lora_a_stacked
        bases, _, rank, d_in = stacked[0].shape
        fused = stacked[0].new_zeros(bases, len(stacked) * rank, d_in)
        views = tuple(fused[:, None, i * rank : (i + 1) * rank] for i in range(len(stacked)))
        for view, old in zip(views, stacked, strict=True):
            view.copy_(old)
        layer.lora_a_stacked = views
        self._fused_v[fused.data_ptr()] = fused

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
        groups = self.groups
        if groups.empty:
            return
        if x.shape[0] != groups.num_tokens:
            raise RuntimeError(f"the LoRA plan is for {groups.num_tokens} tokens and the layer got {x.shape[0]}")
        v = self._fused_v[lora_a_stacked[0].data_ptr()]
        jd_linear_(y, x, [u[:, 0] for u in lora_b_stacked], v, sigma, groups)

    def jd_expand(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("fully sharded LoRA layers are refused on CPU at start-up")

    def add_shrink(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("fully sharded LoRA layers are refused on CPU at start-up")

    def add_expand(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("layers reach the CPU kernel through add_lora_linear")

    def add_lora_linear(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("layers reach the CPU kernel through JDLayerPunica")

    def add_lora_embedding(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("embeddings are refused as LoRA targets at start-up")

    def add_lora_logits(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("lm_head is refused as LoRA target at start-up")

    def apply_lora_full_linear(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("classification heads are refused at start-up")


def _slots_of(lora_ids: np.ndarray, lora_index_to_id: list[int | None]) -> np.ndarray:
    """Base slot of each LoRA id, −1 for the base model (id 0)."""
    unique, inverse = np.unique(lora_ids, return_inverse=True)
    index_of = {lora_id: index for index, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
    return np.array([index_of[int(i)] if i > 0 else -1 for i in unique], dtype=np.int64)[inverse]
