"""Attention over a growing key-value cache without copies: grouped queries, and buffers with room to grow.

transformers repeats keys and values for each group of query heads whenever there is a mask, and appends to its
cache by copying all of it; with tens of sequences of a hundred tokens that costs more than the model's products.
Here the query heads of one key head stand below one another as further queries, and the cache writes in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

IMPLEMENTATION = "jdlora_grouped"
"""Name to load a model with (``attn_implementation``)."""

_ROOM = 32


class _GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, S, d] of one layer, views of buffers with room behind them."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._write(key_states, value_states, 0)
        else:
            self._write(key_states, value_states, self.get_seq_length())
        return self.keys, self.values

    def _write(self, keys: Tensor, values: Tensor, at: int) -> None:
        batch, heads, new, size = keys.shape
        buffers: tuple[Tensor, Tensor] | None = getattr(self, "_buffers", None)
        if buffers is None or buffers[0].shape[0] != batch or buffers[0].shape[2] < at + new:
            buffers = (
                keys.new_empty(batch, heads, at + new + _ROOM, size),
                values.new_empty(batch, heads, at + new + _ROOM, values.shape[-1]),
            )
            if at:
                buffers[0][:, :, :at], buffers[1][:, :, :at] = self.keys, self.values
            self._buffers: tuple[Tensor, Tensor] | None = buffers
        buffers[0][:, :, at : at + new], buffers[1][:, :, at : at + new] = keys, values
        self.keys, self.values = (buffer[:, :, : at + new] for buffer in buffers)


def new_cache() -> Cache:
    """An empty cache for a model of any number of layers."""
    return Cache(layer_class_to_replicate=_GrowingLayer)


def repeated(cache: Cache, times: int) -> Cache:
    """A new cache with the one sequence of ``cache`` for each of ``times`` sequences."""
    copy = new_cache()
    for index, layer in enumerate(cache.layers):
        copy.update(*(side.expand(times, -1, -1, -1) for side in (layer.keys, layer.values)), index)
    return copy


def picked(cache: Cache, rows: Sequence[int]) -> Cache:
    """A new cache of some of the sequences."""
    copy = new_cache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys[rows], layer.values[rows], index)
    return copy


def joined(parts: Sequence[tuple[Cache, Tensor]], width: int) -> Cache:
    """One cache of the sequences of several, with only the positions that count, moved to the front.

    Args:
        parts: caches, and bool [B, S]: which positions of each sequence count.
        width: the most that count in any sequence; what follows those of a shorter one has no meaning.
    """
    copy = new_cache()
    # A stable sort keeps the order of the positions that count; their keys carry their rotation already.
    orders = [torch.argsort(~visible, dim=1, stable=True)[:, :width] for _, visible in parts]
    for index in range(len(parts[0][0].layers)):
        sides = []
        for side in ("keys", "values"):
            compact = []
            for (cache, _), order in zip(parts, orders, strict=True):
                states = getattr(cache.layers[index], side)
                where = order.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                moved = states.gather(2, where)
                compact.append(torch.nn.functional.pad(moved, (0, 0, 0, width - moved.shape[2])))
            sides.append(torch.cat(compact))
        copy.update(*sides, index)
    return copy


def tiled_mask(mask: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """What the attention here expects: bool [B, T, S] → additive [B, 1, groups · T, S]."""
    additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return additive.repeat(1, groups, 1)[:, None]


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None, **_: Any
) -> tuple[Tensor, None]:
    """softmax(Q Kᵀ · scaling + mask) V for Q [B, H, T, d], K and V [B, H / groups, S, d]; [B, T, H, d]."""
    batch, heads, length, size = query.shape
    stacked = query.reshape(batch, key.shape[1], heads // key.shape[1] * length, size)
    output = torch.nn.functional.scaled_dot_product_attention(
        stacked, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, heads, length, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _grouped_attention)
