"""JD-Diag of one slice: U, V unconstrained and shared, a diagonal Σ_i for each adapter (paper §1; CP, PARAFAC)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import FullFit, fit_full
from vllm_jdlora.jd.problem import SliceProblem

# The core that is fitted is wider than the result: the best R columns need not lie in JD-Full's best R dimensions
# (energy lost by 32 real adapters in one slice, R 8: 0.776 at a core of 8, 0.761 at 16, 0.733 at 32, 0.732 at 64).
_CORE, _LEAST_CORE = 2, 32
# Each update pays this share of the mean curvature for leaving its old value: near-parallel columns ("swamps") stay
# solvable, and unlike a plain ridge it cannot make the objective rise.
_RIDGE = 1e-6
# Sweeps after which starts are compared, and how slow sweeps must become, and how often in a row, to stop.
_TRIAL_SWEEPS = 20
_SMALL_GAIN = 1e-4  # 1e-5 takes twice as long and lowers what 32 real adapters lose by 0.3 %
_CALM = 3
# Shares of energy below this are rounding.
_NO_ENERGY = 1e-13
# Directions of the Gram matrix of rank-one terms below this share of the strongest are zero padding.
_PADDING = 1e-12
_CHUNK = 4096


@dataclass(frozen=True)
class DiagFit:
    """ΔW_i ≈ u diag(σ_i) v: columns of u and rows of v have unit norm and are not orthogonal.

    Sorted by energy Σ_i w_i σ_ij², strongest first; the largest entry of each column of u and row of v is positive.
    Columns that nothing was left for are zero, in u, v and sigma.
    """

    u: Tensor  # [d_out, R] in the problem's dtype
    v: Tensor  # [R, d_in]
    sigma: Tensor  # [m, R] in the problem's member order, true scale
    objective: tuple[float, ...]  # Σ_i w_i‖ΔW_i − U diag(σ_i) V‖² at the start and after each sweep; never rises


def fit_diag(problem: SliceProblem, rank: int, *, start: FullFit | None = None, max_sweeps: int = 300) -> DiagFit:
    """Minimise Σ_i w_i‖ΔW_i − U diag(σ_i) V‖² by alternating least squares on JD-Full's cores, then lift (CANDELINC).

    rank: R, columns of U. start: a JD-Full fit of this problem whose bases hold the result (default: one of rank
    max(2R, 32)). The best of several starts goes on: strongest rank-one terms of the adapters, JD-Full's own
    directions, the SVD of the mean, simultaneous diagonalisation, Gaussian (the authors').
    Raises JDLoRAError for rank < 1.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    new = problem.a.new_zeros
    u, v = new(problem.bt.shape[1], rank), new(rank, problem.a.shape[1])
    sigma = new(len(problem), rank)
    if len(problem) == 0:
        return DiagFit(u, v, sigma, (0.0,))
    full = fit_full(problem, max(_CORE * rank, _LEAST_CORE)) if start is None else start
    unit = problem.weights.sqrt() / problem.scale  # true scale -> as important as they are
    cores = full.sigma[:, : full.rank_out, : full.rank_in].double() * unit[:, None, None]
    outside = max(0.0, problem.total - float(cores.square().sum()))
    state = _decompose(cores, rank, max_sweeps)

    energy, order = state.c.square().sum(0).sort(descending=True, stable=True)
    order = order[energy > _NO_ENERGY * energy[0]]
    kept = len(order)
    left = full.u[:, : full.rank_out].double() @ state.a[:, order]
    right = full.v[: full.rank_in].double().T @ state.b[:, order]
    sign_left, sign_right = _signs(left), _signs(right)
    u[:, :kept] = (left * sign_left).to(u)
    v[:kept] = (right * sign_right).T.to(v)
    sigma[:, :kept] = (state.c[:, order] * sign_left * sign_right / unit[:, None]).to(sigma)
    return DiagFit(u, v, sigma, tuple(outside + remaining for remaining in state.objective))


def refit_diag(problem: SliceProblem, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Best σ_i on the bases as stored: (UᵀU ∘ VVᵀ)⁺ diag(Uᵀ ΔW_i Vᵀ).

    u [d_out, R] and v [R, d_in] of any dtype, not orthonormal; zero columns get σ 0. Returns sigma [m, R] fp32 and
    ‖ΔW_i − u diag(σ_i) v‖_F² [m] fp64, both in true scale and member order; the error is that of the fp32 sigma.
    """
    left, right = u.double(), v.double().T
    owner = torch.arange(len(problem), device=problem.a.device).repeat_interleave(
        torch.tensor(problem.ranks, dtype=torch.int64, device=problem.a.device)
    )
    overlap = left.new_zeros(len(problem), left.shape[1])
    for at in range(0, problem.rows, _CHUNK):  # never a second copy of the stacks in fp64
        rows = slice(at, at + _CHUNK)
        overlap.index_add_(0, owner[rows], (problem.bt[rows].double() @ left) * (problem.a[rows].double() @ right))
    overlap = overlap * problem.scale[:, None]
    gram = (left.T @ left) * (right.T @ right)
    sigma = (overlap @ torch.linalg.pinv(gram, rtol=_PADDING, hermitian=True)).float()
    exact = sigma.double()
    error = problem.squared_norms - 2 * (overlap * exact).sum(1) + ((exact @ gram) * exact).sum(1)
    return sigma, error.clamp_min(0)


@dataclass(frozen=True)
class _State:
    a: Tensor  # [p, columns] of unit norm
    b: Tensor  # [q, columns] of unit norm
    c: Tensor  # [m, columns]
    objective: tuple[float, ...]  # Σ_i‖X_i − A diag(c_i) Bᵀ‖²


def _decompose(cores: Tensor, rank: int, max_sweeps: int) -> _State:
    """CP of cores [m, p, q] with at most `rank` terms: the best start after a few sweeps, then to convergence."""
    tries = [_run(cores, _begin(cores, a, b), min(_TRIAL_SWEEPS, max_sweeps)) for a, b in _starts(cores, rank)]
    best = min(tries, key=lambda tried: tried.objective[-1])
    return _run(cores, best, max_sweeps - (len(best.objective) - 1))


def _begin(cores: Tensor, a: Tensor, b: Tensor) -> _State:
    a, b = (side / side.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny) for side in (a, b))
    overlap = ((cores.mT @ a) * b).sum(1)
    gram = (a.T @ a) * (b.T @ b)
    c = overlap @ torch.linalg.pinv(gram, rtol=_PADDING, hermitian=True)
    return _State(a, b, c, (_objective(cores, overlap, gram, c),))


def _run(cores: Tensor, state: _State, sweeps: int) -> _State:
    calm, floor = 0, 1e-6 * len(cores)
    for _ in range(sweeps):
        improved = _sweep(cores, state)
        gain = state.objective[-1] - improved.objective[-1]
        if gain < 0:  # rounding at a fixed point
            break
        state = improved
        calm = calm + 1 if gain <= _SMALL_GAIN * max(state.objective[-1], floor) else 0
        if calm == _CALM:
            break
    return state


def _sweep(cores: Tensor, state: _State) -> _State:
    """A, then B with the new A, then C with both; norms go into C."""
    a, b, c = state.a, state.b, state.c
    a = _update(((cores @ b) * c[:, None]).sum(0), (b.T @ b) * (c.T @ c), a)
    a, c = _into(a, c)
    through = cores.mT @ a  # [m, q, columns]
    b = _update((through * c[:, None]).sum(0), (a.T @ a) * (c.T @ c), b)
    b, c = _into(b, c)
    overlap, gram = (through * b).sum(1), (a.T @ a) * (b.T @ b)
    c = _update(overlap, gram, c)
    return _State(a, b, c, (*state.objective, _objective(cores, overlap, gram, c)))


def _update(target: Tensor, gram: Tensor, old: Tensor) -> Tensor:
    """argmin ‖·‖² + λ‖new − old‖² of the least-squares problem new · gram = target."""
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    guarded = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve((target + ridge * old).T, torch.linalg.cholesky(guarded)).T


def _into(side: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit norm, their norms multiplied into c."""
    norms = side.norm(dim=0)
    return side / norms.clamp_min(torch.finfo(torch.float64).tiny), c * norms


def _objective(cores: Tensor, overlap: Tensor, gram: Tensor, c: Tensor) -> float:
    return max(0.0, float(cores.square().sum() - 2 * (overlap * c).sum() + ((c @ gram) * c).sum()))


def _starts(cores: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """(A [p, columns], B [q, columns]) of several kinds, each filled up with the adapters' strongest terms."""
    terms_a, terms_b = _strongest_terms(cores, rank)
    columns = terms_a.shape[1]
    p, q = cores.shape[1:]
    width = min(columns, p, q)
    mean = torch.linalg.svd(cores.sum(0), full_matrices=False)
    pairs = [
        (terms_a, terms_b),
        (torch.eye(p, width).to(cores), torch.eye(q, width).to(cores)),
        (mean.U[:, :width], mean.Vh[:width].T),
    ]
    if min(len(cores), width) > 1:
        pairs.append(_simultaneous(cores, width))
    draw = torch.Generator().manual_seed(0)
    pairs.append((torch.randn(p, columns, generator=draw).to(cores), torch.randn(q, columns, generator=draw).to(cores)))
    return [(torch.cat([a, terms_a], 1)[:, :columns], torch.cat([b, terms_b], 1)[:, :columns]) for a, b in pairs]


def _strongest_terms(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular pairs of single cores, picked by the energy that those picked before leave of them.

    (A [p, columns], B [q, columns]), columns ≤ rank: fewer when these terms already give every core exactly. With
    adapters that share nothing this is the best rank for each adapter's own SVD.
    """
    svd = torch.linalg.svd(cores, full_matrices=False)
    energy, order = svd.S.square().flatten().sort(descending=True, stable=True)
    order = order[energy > _NO_ENERGY * energy[0]][: 4 * rank + len(cores)]
    member, term = order // svd.S.shape[1], order % svd.S.shape[1]
    a, b, s = svd.U[member, :, term].T, svd.Vh[member, term].T, svd.S[member, term]
    kernel = (a.T @ a) * (b.T @ b) * s[:, None] * s
    left, chosen = kernel.diagonal().clone(), []  # pivoted Cholesky
    done = kernel.new_zeros(len(s), 0)
    for _ in range(min(rank, len(s))):
        pivot = int(left.argmax())
        if float(left[pivot]) <= _NO_ENERGY * float(kernel.diagonal().max()):
            break
        column = (kernel[:, pivot] - done @ done[pivot]) / left[pivot].sqrt()
        done = torch.cat([done, column[:, None]], 1)
        left = left - column.square()
        left[pivot] = 0
        chosen.append(pivot)
    return a[:, chosen], b[:, chosen]


def _simultaneous(cores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of M₁M₂⁻¹ for two mixtures of the leading blocks: exact where the cores have such a form.

    (Direct trilinear decomposition: M_j = A D_j Bᵀ gives M₁M₂⁻¹ = A D₁D₂⁻¹ A⁻¹.) A complex pair gives its real and
    imaginary part.
    """
    block = cores[:, :width, :width]
    mix = torch.linalg.svd(block.flatten(1), full_matrices=False).U[:, :2]
    one, two = torch.einsum("mj,mab->jab", mix, block)
    values, vectors = torch.linalg.eig(one @ torch.linalg.pinv(two, rtol=1e-12))
    left = torch.where(values.imag < 0, vectors.imag, vectors.real)
    right = (torch.linalg.pinv(left, rtol=1e-12) @ two).T
    a, b = cores.new_zeros(cores.shape[1], width), cores.new_zeros(cores.shape[2], width)
    a[:width], b[:width] = left, right
    return a, b


def _signs(columns: Tensor) -> Tensor:
    """[columns] −1 where the largest entry is negative."""
    return torch.where(columns.gather(0, columns.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)
