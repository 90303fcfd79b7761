"""Dense fp64 references for the mathematics: every ΔW as a matrix, plain loops, no code of the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.jd.problem import Factors


def random_factors(n: int, d_out: int, d_in: int, ranks: int | Sequence[int], seed: int = 0) -> list[Factors]:
    """n adapters of the given rank(s), Gaussian factors with decaying strength so that spectra are not flat."""
    draw = torch.Generator().manual_seed(seed)
    ranks = [ranks] * n if isinstance(ranks, int) else list(ranks)
    out = []
    for rank in ranks:
        decay = 0.8 ** torch.arange(rank)
        out.append(Factors(torch.randn(d_out, rank, generator=draw) * decay, torch.randn(rank, d_in, generator=draw)))
    return out


def family_factors(labels: Sequence[int], d: int, rank: int, noise: float, seed: int = 0) -> list[Factors]:
    """Adapters whose column and row spaces lie in their family's, plus noise; mixed signs inside a family."""
    draw = torch.Generator().manual_seed(seed)
    families = max(labels) + 1
    left = torch.linalg.qr(torch.randn(families, d, rank, generator=draw)).Q
    right = torch.linalg.qr(torch.randn(families, d, rank, generator=draw)).Q
    out = []
    for label in labels:
        core = torch.randn(rank, rank, generator=draw)
        b = left[label] @ core + noise * torch.randn(d, rank, generator=draw)
        out.append(Factors(b, right[label].T + noise * torch.randn(rank, d, generator=draw)))
    return out


def dense(factors: Factors) -> Tensor:
    """ΔW [d_out, d_in] fp64."""
    return factors.b.double() @ factors.a.double()


def unit(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix divided by its Frobenius norm."""
    return [w / w.norm() for w in matrices]


def hooi(
    matrices: Sequence[Tensor], rank: int, iterations: int = 200, start: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """U [d_out, rank], V [d_in, rank] and captured energy: full eigensolver in each half step.

    From the HOSVD, or from any `start` [d_in, rank].
    """
    v = _top(sum(w.T @ w for w in matrices), rank) if start is None else torch.linalg.qr(start).Q
    for _ in range(iterations):
        u = _top(sum(w @ v @ v.T @ w.T for w in matrices), rank)
        v = _top(sum(w.T @ u @ u.T @ w for w in matrices), rank)
    return u, v, sum(float((u.T @ w @ v).square().sum()) for w in matrices)


def _top(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


class ListSource:
    """A factor source over lists: `slices[m][i]` is adapter i in slice m. Counts how often slices are read."""

    def __init__(self, slices: Sequence[Sequence[Factors | None]]) -> None:
        self._slices = [list(factors) for factors in slices]
        self.n = len(self._slices[0])
        self.slice_names = [f"slice{m}" for m in range(len(slices))]
        self.reads = 0

    def factors(self, slice_index: int) -> list[Factors | None]:
        self.reads += 1
        return self._slices[slice_index]
