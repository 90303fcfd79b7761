"""Adapters that arrive at fixed bases: how much each cluster captures of them, and the directions that it lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_jdlora.jd.problem import SliceProblem

# Basis directions below this share of the strongest are zero padding.
_PADDING = 1e-6
# Combinations of columns below this share of the strongest are rounding: the columns depend on each other.
_DEPENDENT = 1e-10
# A direction with less than this share of the arrivals' squared norm is rounding of their fp32 factors.
_NO_ENERGY = 1e-13
# Sweeps of the appended directions against each other; the first ones already come from an eigendecomposition.
_SWEEPS = 4


def captured_by_spans(problem: SliceProblem, u: Tensor, v: Tensor, *, orthonormal: bool) -> Tensor:
    """‖P_k ΔW_i Q_k‖² in true scale, [m, K] fp64, P_k and Q_k the projectors on the spans of the bases of cluster k.

    u [K, d_out, R], v [K, R, d_in] of any dtype. orthonormal: columns and rows are so but for the cast to the stored
    dtype, whose tilt is left out: half the time. Bases of a fit in the activation metric are not. The products are in
    fp32: this chooses a cluster, ``refit_sigma`` then measures the error.
    """
    clusters, _, rank = u.shape
    u, v = u.float(), v.float()
    inverse = None if orthonormal else [_inverse_gram(g) for g in (u.mT @ u, v @ v.mT)]
    z = problem.bt.float() @ u.transpose(0, 1).flatten(1)  # [P, K·R]
    t = problem.a.float() @ v.flatten(0, 1).T
    captured = torch.zeros(len(problem), clusters, dtype=torch.float64)
    for k in range(clusters):
        columns = slice(k * rank, (k + 1) * rank)
        overlap = problem.sigmas(z[:, columns], t[:, columns]).double()
        spanned = overlap if inverse is None else inverse[0][k] @ overlap @ inverse[1][k]
        captured[:, k] = (spanned * overlap).flatten(1).sum(1)
    return captured.clamp_min(0) * problem.scale.square()[:, None]


def missing_directions(problem: SliceProblem, u: Tensor, v: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Orthonormal p [d_out, extra] and q [extra, d_in] (fp64) that the bases u [d_out, R], v [R, d_in] lack most.

    They maximise what [u p] and [v; q] together capture of the problem's adapters, each of unit norm, with p and q
    orthogonal to the old spans: the leading directions of the residuals E_i = ΔW_i − P ΔW_i Q, improved by
    Gauss–Seidel sweeps. As many as ρ directions hold one adapter of rank ρ without loss. Zero padding where the
    adapters have fewer.
    """
    u, v = _orthonormal(u.double()), _orthonormal(v.double().T)  # columns
    out, out_core = _outside(problem.bt.double(), u)
    into, in_core = _outside(problem.a.double(), v)
    core = problem.with_stacks(out_core, in_core)
    inside_out, inside_in = problem.bt.double() @ u, problem.a.double() @ v
    whole_in = torch.cat([inside_in, in_core], 1)  # A_i in the basis [v, into]: the norms of its rows are right
    p = _leading(core.bt, core.through_own(whole_in, core.bt), extra)
    for _ in range(_SWEEPS):
        z = torch.cat([inside_out, core.bt @ p], 1)
        q = _leading(core.a, core.through_own(z, core.a), extra)
        t = torch.cat([inside_in, core.a @ q], 1)
        p = _leading(core.bt, core.through_own(t, core.bt), extra)
    return _padded(out @ p, extra), _padded(into @ q, extra).T.contiguous()


def lifted_columns(wanted: Tensor, whitened: Tensor, plain: Tensor) -> Tensor:
    """[d, D] fp64: the combinations of the columns `plain` [d, P] that those of `whitened` [d, P] make `wanted` [d, D].

    plain and whitened: the same columns before and in a metric's coordinates, whose span holds the wanted ones.
    """
    columns = whitened.double()
    scale = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    combination = torch.linalg.lstsq(columns / scale, wanted.double(), rcond=_DEPENDENT, driver="gelsd").solution
    return (plain.double() / scale) @ combination


def _inverse_gram(grams: Tensor) -> Tensor:
    """[K, R, R] fp64 pseudo-inverses; zero columns of a basis stay out."""
    return torch.linalg.pinv(grams.double(), rtol=_PADDING, hermitian=True)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span [d, r], r ≤ R."""
    left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, singular > _PADDING * singular.max().clamp_min(torch.finfo(torch.float64).tiny)]


def _outside(rows: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(Q [d, p], C [P, p]): the part of the rows [P, d] outside the span of `basis` is C Qᵀ."""
    for _ in range(2):  # once leaves rounding of the large inside part
        rows = rows - (rows @ basis) @ basis.T
    q, r = torch.linalg.qr(rows.T)
    return q, r.T.contiguous()


def _leading(stack: Tensor, through: Tensor, extra: int) -> Tensor:
    """Leading eigenvectors [p, ≤ extra] of Σ_i w_i S_iᵀ (X_iX_iᵀ) S_i, given through = [w_i X_iX_iᵀ S_i]."""
    gram = stack.T @ through
    energy, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    kept = min(extra, int((energy > _NO_ENERGY).sum()))
    return vectors.flip(1)[:, :kept]


def _padded(columns: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(columns, (0, width - columns.shape[1]))
