"""Who is in a step, planned once for all layers: tokens sorted by cluster and cut into tiles, in tensors that stay put.

The Triton kernels read only this. Row p of their scratch belongs to the token ``sorted_token[p]``, so that scratch is
dense and a layer's grid follows from its padded token count and the number of clusters alone. Planning works on runs
of equal neighbours (a sequence's tokens lie together), so it costs O(tokens) numpy and sorts sequences, not tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_jdlora.errors import JDLoRAError

DECODE_ROWS, PREFILL_ROWS = 16, 32
"""Rows of a tile. Below 64 no GPU multiplies with wgmma or tcgen05: Triton's wgmma gives NaN in kernels of this kind
(triton-lang/triton#9433, vllm-project/vllm#48590)."""
PREFILL_TOKENS = 512
"""Steps of more (padded) tokens use tiles of ``PREFILL_ROWS``."""


def max_tiles(tokens: int, rows: int, clusters: int) -> int:
    """How many tiles of at most ``rows`` tokens of one cluster ``tokens`` tokens can need; grows with each argument."""
    groups = min(tokens, clusters)
    return groups + (tokens - groups) // rows


class TokenTiles:
    """The plan of a step on the device, always at the same addresses (CUDA graphs keep them).

    Attributes:
        tokens: how many tokens the step has.
        live: how many of them have an adapter.
        sorted_token: int32 [capacity], the token of each sorted row; rows from ``live`` on mean nothing.
        sorted_slot: int32 [capacity], its scaling slot; −1 from ``live`` on.
        sorted_cluster: int32 [capacity], its cluster; −1 from ``live`` on.
    """

    def __init__(self, capacity: int, clusters: int, device: torch.device | str):
        """
        Args:
            capacity: most tokens of a step.
            clusters: pairs of bases in V and U, those of plain adapters among them.
            device: of the tensors.
        """
        self.capacity, self.clusters = capacity, clusters
        self.tokens = self.live = 0
        counts = {rows: max_tiles(capacity, rows, clusters) for rows in (DECODE_ROWS, PREFILL_ROWS)}
        sizes = [capacity] * 3 + [3 * _round_up(count) for count in counts.values()]
        # Every part starts at a multiple of 16 bytes, so that no launch compiles for another alignment.
        self._starts = [0, *np.cumsum([_round_up(size) for size in sizes]).tolist()]
        self._packed = torch.full((self._starts[-1],), -1, dtype=torch.int32, device=device)
        self.sorted_token = self._packed[self._starts[0] :][:capacity]
        self.sorted_slot = self._packed[self._starts[1] :][:capacity]
        self.sorted_cluster = self._packed[self._starts[2] :][:capacity]
        self._tiles = {
            rows: self._packed[start:][: 3 * _round_up(count)].view(3, -1)
            for (rows, count), start in zip(counts.items(), self._starts[3:], strict=False)
        }

    def tiles(self, rows: int) -> torch.Tensor:
        """int32 [3, ≥ max_tiles(capacity)]: cluster (−1: no tile), first sorted row and number of rows of each tile."""
        return self._tiles[rows]

    def plan(self, token_cluster: np.ndarray, token_slot: np.ndarray) -> None:
        """Take the next step; everything behind it becomes −1, because a replayed graph runs on padded tokens.

        Args:
            token_cluster: int [tokens], −1 for the base model.
            token_slot: int [tokens], −1 for the base model.

        Raises:
            JDLoRAError: more tokens than the capacity, or arrays of different lengths.
        """
        tokens = len(token_slot)
        if tokens > self.capacity:
            raise JDLoRAError(f"{tokens} tokens in a step of at most {self.capacity}: raise --max-num-batched-tokens")
        if len(token_cluster) != tokens:
            raise JDLoRAError(f"{len(token_cluster)} clusters for {tokens} scaling slots")
        # New pinned memory each step: torch's host allocator hands a block out again only after the copy from it has
        # run, whereas one buffer of our own could be overwritten while the previous step's copy is still queued.
        staged = torch.empty(self._packed.shape, dtype=torch.int32, pin_memory=self._packed.is_cuda)
        host = staged.numpy()
        host.fill(-1)
        self.tokens, self.live = tokens, self._fill(host, token_cluster, token_slot)
        self._packed.copy_(staged, non_blocking=True)

    def _fill(self, host: np.ndarray, token_cluster: np.ndarray, token_slot: np.ndarray) -> int:
        starts, lengths = runs(token_cluster, token_slot)
        clusters, slots = token_cluster[starts], token_slot[starts]
        adapted = (clusters >= 0) & (slots >= 0)
        if not adapted.any():
            return 0
        starts, lengths, clusters, slots = starts[adapted], lengths[adapted], clusters[adapted], slots[adapted]
        # Equal slots side by side read the same Σ from cache.
        order = np.lexsort((slots, clusters))
        starts, lengths, clusters, slots = starts[order], lengths[order], clusters[order], slots[order]
        ends = np.cumsum(lengths)
        live = int(ends[-1])
        shift = np.repeat(starts - (ends - lengths), lengths)
        host[: self.capacity][:live] = shift + np.arange(live)
        host[self._starts[1] :][:live] = np.repeat(slots, lengths)
        host[self._starts[2] :][:live] = np.repeat(clusters, lengths)
        first_runs, _ = runs(clusters)
        counts = np.add.reduceat(lengths, first_runs)
        for start, (rows, device_tiles) in zip(self._starts[3:], self._tiles.items(), strict=False):
            tiles = host[start:][: device_tiles.numel()].reshape(3, -1)
            _cut(tiles, clusters[first_runs], counts, rows)
        return live


def _cut(tiles: np.ndarray, clusters: np.ndarray, counts: np.ndarray, rows: int) -> None:
    """Tiles of at most ``rows`` rows of each cluster, whose ``counts`` rows follow one another."""
    pieces = -(-counts // rows)
    group = np.repeat(np.arange(len(counts)), pieces)
    within = (np.arange(len(group)) - (np.cumsum(pieces) - pieces)[group]) * rows
    tiles[0, : len(group)] = clusters[group]
    tiles[1, : len(group)] = (np.cumsum(counts) - counts)[group] + within
    tiles[2, : len(group)] = np.minimum(rows, counts[group] - within)


def runs(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First index and length of each run of rows that are equal in all columns; int64 [runs] each."""
    size = len(columns[0])
    if size == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    changed = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        changed |= column[1:] != column[:-1]
    starts = np.concatenate(([0], np.flatnonzero(changed) + 1))
    return starts, np.diff(starts, append=size)


def _round_up(size: int) -> int:
    return -(-size // 4) * 4
