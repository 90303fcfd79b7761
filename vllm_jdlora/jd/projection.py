"""Adapters on given bases: the best Σ_i, its exact error, and the energy each cluster's bases would capture."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_jdlora.jd.problem import SliceProblem

# Rows turned into fp64 at a time: bounds the extra memory to a few hundred MB at hidden size 4096.
_CHUNK = 4096
# Columns of all clusters' bases multiplied at a time: wide enough for an efficient GEMM, narrow enough for memory.
_COLUMNS = 512
# Basis directions below this share of the strongest are zero padding to the pseudo-inverse.
_PADDING = 1e-6


def refit_sigma(problem: SliceProblem, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Best scalings on the bases as stored: Σ_i = (UᵀU)⁺ Uᵀ ΔW_i V̂ (V̂ᵀV̂)⁺ with V̂ = vᵀ.

    u [d_out, R] and v [R, d_in] of any dtype, orthonormal or not (a cast to bf16 tilts them), zero columns allowed.
    Returns sigma [m, R, R] fp32 and ‖ΔW_i − U Σ_i v‖_F² [m] fp64, both in true scale and member order; the error is
    that of the fp32 sigma returned.
    """
    u, v = u.double(), v.double().T
    gram_u, gram_v = u.T @ u, v.T @ v
    overlap = problem.sigmas(_rows_times(problem.bt, u), _rows_times(problem.a, v))
    overlap = overlap * problem.scale[:, None, None]
    inverse_u, inverse_v = (torch.linalg.pinv(g, rtol=_PADDING, hermitian=True) for g in (gram_u, gram_v))
    sigma = (inverse_u @ overlap @ inverse_v).float()
    exact = sigma.double()
    cross = (overlap * exact).flatten(1).sum(1)
    square = ((gram_u @ exact) * (exact @ gram_v)).flatten(1).sum(1)
    return sigma, (problem.squared_norms - 2 * cross + square).clamp_min(0)


def squared_errors(problem: SliceProblem, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """‖ΔW_i − U Σ_i v‖_F² [m] fp64 in true scale, for scalings as they are stored: any dtype, best ones or not.

    u [d_out, R], v [R, d_in]; sigma [m, R, R], or [m, R] for diagonal ones.
    """
    u, v, exact = u.double(), v.double().T, sigma.double()
    exact = exact if exact.ndim == 3 else torch.diag_embed(exact)
    overlap = problem.sigmas(_rows_times(problem.bt, u), _rows_times(problem.a, v))
    cross = (overlap * exact).flatten(1).sum(1) * problem.scale
    square = (((u.T @ u) @ exact) * (exact @ (v.T @ v))).flatten(1).sum(1)
    return (problem.squared_norms - 2 * cross + square).clamp_min(0)


def captured_by_cluster(problem: SliceProblem, u: Tensor, v: Tensor) -> Tensor:
    """w_i‖U_kᵀ ΔW_i V_k‖² [m, K] fp64 for orthonormal bases u [K, d_out, R], v [K, R, d_in]."""
    clusters, _, rank = u.shape
    step = max(1, _COLUMNS // rank)
    u, v = u.to(problem.a.dtype), v.to(problem.a.dtype)
    parts = [
        problem.energies_by_block(*problem.times(_columns(u[k : k + step]), _columns(v[k : k + step].mT)), rank)
        for k in range(0, clusters, step)
    ]
    return torch.cat(parts, 1)


def _columns(bases: Tensor) -> Tensor:
    """[k, d, R] -> [d, k·R]."""
    return bases.transpose(0, 1).flatten(1)


def _rows_times(rows: Tensor, basis: Tensor) -> Tensor:
    """rows [P, d] @ basis [d, R] in fp64 without a full fp64 copy of the rows."""
    parts = [chunk.double() @ basis for chunk in rows.split(_CHUNK)]
    return torch.cat(parts) if parts else basis.new_zeros(0, basis.shape[1])
