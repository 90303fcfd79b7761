"""The punica wrapper for CPU: plans a step once, then runs the grouped kernel for each layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from vllm_jdlora.kernels.cpu_grouped import TokenGroups, jd_linear_

_NO_TOKENS = np.empty(0, dtype=np.int64)


class JDPunicaCPU(PunicaWrapperBase):
    """What a step's layers share: the plan of who is in the batch.

    vLLM's own CPU wrapper gathers a whole LoRA matrix for each token, and on 0.32 takes the base model's −1 for the
    last slot; nothing of it is used here.
    """

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        forward_context_layers: dict[str, Any],
    ):
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._forward_context_layers = forward_context_layers
        self._token_base = _NO_TOKENS
        self.groups = TokenGroups.plan(_NO_TOKENS, _NO_TOKENS)

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

    def update_scaling_slots(self, token_slots: np.ndarray) -> None:
        self.update_tokens(self._token_base, token_slots)

    def update_tokens(self, token_base: np.ndarray, token_slot: np.ndarray) -> None:
        """Plan the step: base slot and scaling slot of each token, int64 [T] each; −1 for none."""
        self.groups = TokenGroups.plan(token_base, token_slot)

    def for_layer(self, name: str, layer: Any, sigma: torch.Tensor) -> LayerPunicaCPU:
        """The wrapper of one LoRA layer, with its rows of the Σ buffer [slots, slices, R, R]."""
        wrapper = LayerPunicaCPU(self, f"{name}.jdlora", layer, sigma)
        self._forward_context_layers[wrapper.name] = wrapper
        return wrapper

    def _unreachable(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this LoRA layer should have been refused at start-up: only linear layers are served on CPU")

    add_shrink = add_expand = add_lora_linear = _unreachable
    add_lora_embedding = add_lora_logits = apply_lora_full_linear = _unreachable


class LayerPunicaCPU:
    """The wrapper that one layer sees; it owns the layer's V, laid out so that shrink is one product for all slices.

    The layer reaches the kernel through an operator that torch.compile does not look into, so that vLLM can compile
    the model around it. The operator finds the layer by name in vLLM's forward context, as attention does: compiled
    code that vLLM caches on disk is then right for any engine.
    """

    def __init__(self, shared: JDPunicaCPU, name: str, layer: Any, sigma: torch.Tensor):
        self._shared = shared
        self.name = name
        self._sigma = sigma
        self._v = _fuse_slices(layer)
        self._u = _lay_bases_side_by_side(layer)

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
        torch.ops.vllm_jdlora.linear_cpu_(y, x, self.name)

    def run(self, y: torch.Tensor, x: torch.Tensor) -> None:
        groups = self._shared.groups
        if groups.empty:
            return
        if x.shape[0] != groups.num_tokens:
            raise RuntimeError(f"the LoRA plan is for {groups.num_tokens} tokens and the layer got {x.shape[0]}")
        jd_linear_(y, x, self._u, self._v, self._sigma, groups)


def _fuse_slices(layer: Any) -> torch.Tensor:
    """V of all slices in one tensor [bases, slices · R, d_in]; vLLM goes on writing through views of it."""
    stacked = layer.lora_a_stacked
    bases, _, rank, d_in = stacked[0].shape
    fused = stacked[0].new_zeros(bases, len(stacked) * rank, d_in)
    layer.lora_a_stacked = tuple(fused[:, None, i * rank : (i + 1) * rank] for i in range(len(stacked)))
    for view, old in zip(layer.lora_a_stacked, stacked, strict=True):
        view.copy_(old)
    return fused


def _lay_bases_side_by_side(layer: Any) -> list[torch.Tensor]:
    """U of each slice as [d_out, bases, R]; vLLM goes on writing through views of it."""
    stacked = layer.lora_b_stacked
    laid = [u[:, 0].transpose(0, 1).contiguous() for u in stacked]
    layer.lora_b_stacked = tuple(u.transpose(0, 1)[:, None] for u in laid)
    return laid


def _slots_of(lora_ids: np.ndarray, lora_index_to_id: list[int | None]) -> np.ndarray:
    """Base slot of each LoRA id, −1 for the base model (id 0)."""
    unique, inverse = np.unique(lora_ids, return_inverse=True)
    index_of = {lora_id: index for index, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
    return np.array([index_of[int(i)] if i > 0 else -1 for i in unique], dtype=np.int64)[inverse]


_library = torch.library.Library("vllm_jdlora", "FRAGMENT")
_library.define("linear_cpu_(Tensor(a!) y, Tensor x, str layer) -> ()")


@torch.library.impl(_library, "linear_cpu_", "CPU")
def _linear_cpu_(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[layer].run(y, x)


@torch.library.register_fake("vllm_jdlora::linear_cpu_", lib=_library)
def _fake_linear_cpu_(y: torch.Tensor, x: torch.Tensor, layer: str) -> None:
    """What torch.compile sees: ``y`` is mutated, nothing is returned."""
