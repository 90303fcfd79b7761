"""Baselines that keep one merged ΔW for all adapters of a slice: their average, and TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.baselines import BaselineFit, truncated
from vllm_jdlora.jd.problem import Factors


def average(factors: Sequence[Factors | None], rank: int | None = None) -> BaselineFit:
    """The mean of the ΔW_i that are present, for every adapter; cut to `rank` by SVD, None keeps all of it."""
    present = [f for f in factors if f is not None]
    if not present:
        return BaselineFit(list(factors), 0)
    b = torch.cat([f.b.double() for f in present], 1) / len(present)
    return _for_all(factors, b, torch.cat([f.a.double() for f in present]), rank)


def ties(factors: Sequence[Factors | None], rank: int | None = None, *, keep: float = 0.2) -> BaselineFit:
    """TIES merging (2306.01708), the paper's `topk20_mass_dis-mean_none`: trim, elect signs, disjoint mean.

    Of each ΔW_i the share `keep` of largest entries stays; each entry's elected sign is that of the sum; the merged
    entry is the mean of those that have it. Cut to `rank` by SVD, None keeps all of it. Dense, but one adapter at a
    time. Raises JDLoRAError for a share outside 0..1.
    """
    if not 0 < keep <= 1:
        raise JDLoRAError(f"keep {keep}: give the share of entries to keep, above 0 and up to 1")
    present = [f for f in factors if f is not None]
    if not present:
        return BaselineFit(list(factors), 0)
    thresholds = [_threshold(f.b @ f.a, keep) for f in present]
    mass = present[0].b.new_zeros(present[0].b.shape[0], present[0].a.shape[1], dtype=torch.float64)
    for f, threshold in zip(present, thresholds, strict=True):
        mass += _trimmed(f, threshold)
    elected = mass.sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)  # as in the authors' merge
    total, votes = torch.zeros_like(mass), torch.zeros_like(mass)
    for f, threshold in zip(present, thresholds, strict=True):
        trimmed = _trimmed(f, threshold)
        agrees = trimmed * elected > 0
        total += torch.where(agrees, trimmed, 0.0)
        votes += agrees
    merged = total / votes.clamp_min(1)
    return _for_all(factors, merged, torch.eye(merged.shape[1], dtype=merged.dtype, device=merged.device), rank)


def _threshold(delta: Tensor, keep: float) -> Tensor:
    """The magnitude from which on entries are among the largest share `keep`."""
    magnitudes = delta.abs().flatten()
    dropped = max(1, magnitudes.numel() - int(keep * magnitudes.numel()))
    return magnitudes.kthvalue(dropped).values


def _trimmed(factors: Factors, threshold: Tensor) -> Tensor:
    delta = factors.b @ factors.a
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def _for_all(factors: Sequence[Factors | None], b: Tensor, a: Tensor, rank: int | None) -> BaselineFit:
    """b a for every adapter that is present; stored dense where that takes fewer numbers than its factors."""
    d_out, d_in = b.shape[0], a.shape[1]
    if rank is not None and rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    merged = truncated(b, a, min(d_out, d_in) if rank is None else rank)
    numbers = min(merged.b.numel() + merged.a.numel(), d_out * d_in)
    return BaselineFit([None if f is None else merged for f in factors], numbers)
