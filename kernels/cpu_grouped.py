"""The LoRA linear on CPU: one matrix product for each cluster in the batch, in fp32.

Two steps, as in flashinfer: :meth:`TokenGroups.plan` looks once at who is in the batch; :func:`jd_linear_` runs
for every layer on that plan. While the same requests decode, the plan and what it caches are reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


class Run(NamedTuple):
    """Sorted tokens ``start:stop`` that share ``key``, a cluster or a scaling slot."""

    key: int
    start: int
    stop: int


# Σ of every token is gathered, and multiplied in one call, up to this many numbers for a layer (1 MiB); above it, and
# where tokens share adapters, one product for each adapter reads less. Measured at rank 16 and 64, 32 tokens.
_GATHERED_NUMBERS = 1 << 18


# Expand with several clusters in the batch: one product over all clusters for a slice, or one for each cluster. A call
# costs as much as about this many multiplications that hit zeros (10 µs; two cores with AVX-512).
_FLOPS_OF_A_CALL = 1_000_000


@dataclass
class TokenGroups:
    """The tokens of a step, sorted by cluster and then by scaling slot; tokens without an adapter are left out.

    Attributes:
        num_tokens: rows of x and y that the plan is for.
        tokens: int64 [L], the sorted rows; ``None`` when they are all rows in their order.
        clusters: runs of equal cluster over the L sorted tokens.
        slots: runs of equal scaling slot over the L sorted tokens.
        cluster_of_token: int64 [L].
        slot_of_token: int64 [L].
    """

    num_tokens: int
    tokens: torch.Tensor | None
    clusters: list[Run]
    slots: list[Run]
    cluster_of_token: torch.Tensor
    slot_of_token: torch.Tensor
    _gathered: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(cls, token_cluster: np.ndarray, token_slot: np.ndarray) -> TokenGroups:
        """Plan for tokens with these clusters and scaling slots (integer arrays [T]; −1 means no adapter)."""
        live = np.flatnonzero((token_cluster >= 0) & (token_slot >= 0))
        order = live[np.lexsort((token_slot[live], token_cluster[live]))]
        cluster, slot = token_cluster[order], token_slot[order]
        in_order = len(order) == len(token_cluster) and bool(np.all(order[:-1] < order[1:]))
        return cls(
            num_tokens=len(token_cluster),
            tokens=None if in_order else torch.from_numpy(order.astype(np.int64)),
            clusters=_runs(cluster),
            slots=_runs(slot),
            cluster_of_token=torch.from_numpy(cluster.astype(np.int64)),
            slot_of_token=torch.from_numpy(slot.astype(np.int64)),
        )

    @property
    def empty(self) -> bool:
        return not self.clusters

    def gathered_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Σ of each sorted token, fp32 [L, slices, R, R] (or [L, slices, R]), kept for the steps that follow.

        Valid while no scaling slot is overwritten: whoever writes a slot must plan anew.
        """
        key = sigma.data_ptr()
        if key not in self._gathered:
            self._gathered[key] = sigma.index_select(0, self.slot_of_token).float()
        return self._gathered[key]


def _runs(keys: np.ndarray) -> list[Run]:
    if not len(keys):
        return []
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    stops = np.append(starts[1:], len(keys))
    return [Run(int(keys[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def jd_linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    u: Sequence[torch.Tensor],
    v: torch.Tensor,
    sigma: torch.Tensor,
    groups: TokenGroups,
) -> None:
    """``y[t] += U[c(t)] · (Σ[s(t)] · (V[c(t)] · x[t]))`` in place (meaning: ``reference.jd_linear``).

    Args:
        y: [T, sum of d_out over slices], any float dtype. Rows without an adapter are not touched.
        x: [T, d_in].
        u: for each slice fp32 [d_out, C, R] (contiguous), so that a cluster's U and the U of all clusters side by
            side are both one matrix.
        v: fp32 [C, slices · R, d_in], the slices of a cluster one below the other, so that q, k and v (which see
            the same x) cost one product.
        sigma: [slots, slices, R, R] or, for JD-Diag, [slots, slices, R].
        groups: the step's plan for T tokens.
    """
    if groups.empty:
        return
    tokens = groups.tokens
    rows = x if tokens is None else x.index_select(0, tokens)
    scaled = apply_sigma(shrink(rows.float(), v, groups), sigma, groups)
    if tokens is None and y.dtype == torch.float32:
        expand_(y, scaled, u, groups)
        return
    # One rounding to the output's dtype, after the fp32 sum.
    out = (y if tokens is None else y.index_select(0, tokens)).float()
    expand_(out, scaled, u, groups)
    if tokens is None:
        y.copy_(out)
    else:
        y.index_copy_(0, tokens, out.to(y.dtype))


def shrink(rows: torch.Tensor, v: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """``V[c] · x`` for sorted tokens: rows fp32 [L, d_in] → fp32 [L, slices · R]."""
    if len(groups.clusters) == 1:
        return torch.mm(rows, v[groups.clusters[0].key].t())
    hidden = rows.new_empty(rows.shape[0], v.shape[1])
    for cluster, start, stop in groups.clusters:
        torch.mm(rows[start:stop], v[cluster].t(), out=hidden[start:stop])
    return hidden


def apply_sigma(hidden: torch.Tensor, sigma: torch.Tensor, groups: TokenGroups) -> torch.Tensor:
    """``Σ[s] · h`` for sorted tokens: fp32 [L, slices · R] → fp32 [L, slices, R]."""
    slices, rank = sigma.shape[1], sigma.shape[2]
    h = hidden.view(-1, slices, rank)
    if sigma.ndim == 3:
        return h * groups.gathered_sigma(sigma)
    if h.shape[0] == len(groups.slots) or h.numel() * rank <= _GATHERED_NUMBERS:
        gathered = groups.gathered_sigma(sigma)
        return torch.bmm(gathered.view(-1, rank, rank), h.reshape(-1, rank, 1)).view(-1, slices, rank)
    out = torch.empty_like(h)
    for slot, start, stop in groups.slots:
        # [slices, l, R] x [slices, R, R]ᵀ
        torch.bmm(
            h[start:stop].transpose(0, 1),
            sigma[slot].float().transpose(1, 2),
            out=out[start:stop].transpose(0, 1),
        )
    return out


def expand_(out: torch.Tensor, scaled: torch.Tensor, u: Sequence[torch.Tensor], groups: TokenGroups) -> None:
    """``out += U[c] · g`` for sorted tokens: out fp32 [L, sum of d_out], scaled fp32 [L, slices, R]."""
    clusters, rank = u[0].shape[1:]
    active = len(groups.clusters)
    zeros_too = 2 * clusters * rank * out.numel() <= (active - 1) * len(u) * _FLOPS_OF_A_CALL
    if zeros_too:
        placed = scaled.new_zeros(scaled.shape[1], scaled.shape[0], clusters, rank)
        rows = torch.arange(scaled.shape[0])
        placed[:, rows, groups.cluster_of_token] = scaled.transpose(0, 1)
    column = 0
    for i, u_slice in enumerate(u):
        columns = out[:, column : column + u_slice.shape[0]]
        if zeros_too:
            columns.addmm_(placed[i].flatten(1), u_slice.flatten(1).t())
        else:
            for cluster, start, stop in groups.clusters:
                columns[start:stop].addmm_(scaled[start:stop, i], u_slice[:, cluster].t())
        column += u_slice.shape[0]
