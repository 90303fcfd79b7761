"""Rank and clusters as the paper chooses them (arXiv 2407.00066, §6.5), from one module in the middle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Clustering, Progress, refit
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.search import best_assignment

_RANK = 16
_UNCLUSTERED = 100
_CLUSTERS = (1, 2, 4, 7, 8, 10, 16, 25)
_ERROR = 0.6
_SWEEPS = 4


def paper_rule(n: int) -> tuple[int, int]:
    """(rank, clusters) as in the paper (arXiv 2407.00066, §6.5) for n adapters.

    Up to 100 adapters one cluster of rank n/2 + 7; here rounded up to a multiple of 8, at least 16 and at most 64.
    Above, rank 16 and 7, 10 or 25 clusters for up to 128, 256 and more adapters.
    """
    if n <= _UNCLUSTERED:
        return min(64, max(16, 8 * math.ceil((n / 2 + 7) / 8))), 1
    return 16, 7 if n <= 128 else 10 if n <= 256 else 25


@dataclass(frozen=True)
class PaperChoice:
    """What `paper_preset` chose; `squared_error` is the mean of ‖ΔW−UΣV‖²/‖ΔW‖² on the middle module, if measured."""

    rank: int
    clusters: int
    squared_error: float | None = None


def paper_preset(
    slices: Sequence[SliceProblem], n: int, *, seed: int = 0, progress: Progress | None = None
) -> PaperChoice:
    """The paper's choice (arXiv 2407.00066, §6.5), for slices in the model's order; only the middle one is read.

    Up to 100 adapters one cluster of rank n/2 + 7, rounded up to a multiple of 8, at least 16 and at most 64. Above,
    rank 16 and the least K of (1, 2, 4, 7, 8, 10, 16, 25) whose mean relative squared error, which is what the
    authors' code reports, is under 0.6 on the middle module; 25 if none is. Fitted as this package fits, which loses
    a little less than the authors' random start.
    """
    if n <= _UNCLUSTERED:
        return PaperChoice(*paper_rule(n))
    middle = [slices[len(slices) // 2]]
    if len(middle[0]) == 0:
        raise JDLoRAError("no adapter has anything in the middle module: give rank and clusters")
    error = 1.0
    for done, k in enumerate(_CLUSTERS):
        labels = best_assignment(middle, n, _RANK, k, seed, lambda *_: None, effort=0)
        state = refit(middle, Clustering.unfitted(labels, k), _RANK, _SWEEPS, lambda *_: None)
        error = state.objective[-1] / len(middle[0])
        if progress:
            progress("paper's choice", done + 1, len(_CLUSTERS))
        if error < _ERROR:
            break
    return PaperChoice(_RANK, k, error)
