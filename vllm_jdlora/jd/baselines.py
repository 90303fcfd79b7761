"""What JD is compared with, one slice at a time: SVD of each adapter, PCA of the factors, random clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.metric import SliceMetric
from vllm_jdlora.jd.problem import Factors, SliceProblem

# Directions with less than this share of the strongest one's energy are rounding, not data.
_NO_ENERGY = 1e-13


@dataclass(frozen=True)
class BaselineFit:
    """What a baseline makes of one slice.

    Attributes:
        factors: one for each adapter, None where it had none.
        numbers: how many values it stores for the slice, shared parts counted once.
    """

    factors: list[Factors | None]
    numbers: int


def svd_each(
    factors: Sequence[Factors | None],
    rank: int,
    *,
    second_moment: Tensor | None = None,
    gradients: Tensor | None = None,
) -> BaselineFit:
    """Truncated SVD of each ΔW_i: the best that an adapter of this rank can do (paper, baseline "SVD"; K = n).

    second_moment: C = E[xxᵀ] [d_in, d_in] of the module's input, any scale: then the best in E‖(ΔW_i − ·)x‖²
    (ASVD, SVD-LLM). With C = LLᵀ and ΔW L = P S Qᵀ that is P_r P_rᵀ ΔW, which needs no inverse of L. gradients: G
    [d_out, d_out] of the module's output too: then the best in that metric (`SliceMetric`), M⁻ᵀ P_r P_rᵀ Mᵀ ΔW with
    G = MMᵀ and Mᵀ ΔW L = P S Qᵀ.
    Raises JDLoRAError for rank < 1 or a C that is no second moment.
    """
    _check(rank)
    metric = None if second_moment is None else SliceMetric.of(second_moment, "of the baseline")
    if metric is not None and gradients is not None:
        metric = metric.with_gradients(gradients, "of the baseline")
    kept: list[Factors | None] = []
    for f in factors:
        if f is None or metric is None:
            kept.append(None if f is None else truncated(f.b, f.a, rank))
            continue
        b = metric.whitened_out(f.b.double())
        left = truncated(b, metric.whitened(f.a.double()), rank).b.double()
        left = left / left.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        right = ((left.T @ b) @ f.a.double()).float()
        if metric.root_out is not None:
            left = torch.linalg.solve_triangular(metric.root_out.T, left, upper=True)
        kept.append(Factors(left.float(), right))
    return BaselineFit(kept, sum(f.b.numel() + f.a.numel() for f in kept if f is not None))


def factor_pca(factors: Sequence[Factors | None], rank: int) -> BaselineFit:
    """The "share" form (EigenLoRAx 2502.04700, Share 2602.06043): one basis for all rows of A, one for columns of B.

    `rank` principal directions of each side, uncentred, and each adapter's coefficients: ΔW_i ≈ P (PᵀB_i)(A_iQ) Qᵀ.
    The sides are fitted apart, so the result changes with the factors that a product is written in.
    """
    _check(rank)
    present = [f for f in factors if f is not None]
    if not present:
        return BaselineFit(list(factors), 0)
    left = _principal(torch.cat([f.b.double().T for f in present]), rank)
    right = _principal(torch.cat([f.a.double() for f in present]), rank)
    kept: list[Factors | None] = []
    numbers = left.numel() + right.numel()
    for f in factors:
        if f is None:
            kept.append(None)
            continue
        of_b, of_a = left.T @ f.b.double(), f.a.double() @ right
        numbers += of_b.numel() + of_a.numel()
        kept.append(Factors((left @ of_b).float(), (of_a @ right.T).float()))
    return BaselineFit(kept, numbers)


def random_labels(n: int, clusters: int, seed: int) -> Tensor:
    """Labels [n] int64: every cluster of the same size (±1), members drawn by seed."""
    labels = torch.empty(n, dtype=torch.int64)
    labels[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] = torch.arange(n) % clusters
    return labels


def random_assignment(factors: Sequence[Factors | None], rank: int, clusters: int, seed: int) -> BaselineFit:
    """This package's JD-Full in clusters of random members: what the assignment is worth. Same labels in all slices.

    Raises JDLoRAError for rank < 1 or if no adapter has factors.
    """
    labels = random_labels(len(factors), clusters, seed)
    problem = SliceProblem.from_factors(factors, "of the baseline")
    kept = nothing_like(factors)
    numbers = 0
    own = labels[problem.members.cpu()]
    for k in own.unique().tolist():
        part = problem.subset((own == k).nonzero()[:, 0])
        fit = fit_full(part, rank)
        numbers += fit.u.numel() + fit.v.numel() + fit.sigma.numel()
        v = fit.v.float()
        for sigma, member in zip(fit.sigma, part.members.tolist(), strict=True):
            kept[member] = Factors((fit.u @ sigma).float(), v)
    return BaselineFit(kept, numbers)


def truncated(b: Tensor, a: Tensor, rank: int) -> Factors:
    """Best rank-r approximation of b a, b [d_out, P], a [P, d_in], without the product: QR of both, SVD of the core.

    b' = U_r S_r [d_out, min(rank, P, d_out, d_in)], a' = V_rᵀ; computed in fp64.
    """
    q_left, r_left = torch.linalg.qr(b.double())
    q_right, r_right = torch.linalg.qr(a.double().T)
    svd = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    left = q_left @ (svd.U[:, :rank] * svd.S[:rank])
    return Factors(left.float(), (svd.Vh[:rank] @ q_right.T).float())


def nothing_like(factors: Sequence[Factors | None]) -> list[Factors | None]:
    """Zero factors of rank 1 for each adapter that is present."""
    return [None if f is None else Factors(torch.zeros_like(f.b[:, :1]), torch.zeros_like(f.a[:1])) for f in factors]


def _principal(rows: Tensor, rank: int) -> Tensor:
    """[d, ≤ rank] leading right singular vectors of rows [P, d], from the smaller Gram matrix."""
    narrow = rows.shape[1] <= rows.shape[0]
    energy, vectors = torch.linalg.eigh(rows.T @ rows if narrow else rows @ rows.T)
    energy, vectors = energy.flip(0)[:rank], vectors.flip(1)[:, :rank]
    vectors = vectors[:, energy > _NO_ENERGY * energy[0]]
    return vectors if narrow else torch.nn.functional.normalize(rows.T @ vectors, dim=0)


def _check(rank: int) -> None:
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
