"""JD-Diag of one slice: U, V unconstrained and shared, a diagonal Σ_i for each adapter (paper §1; CP, PARAFAC)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.diag_starts import starts
from vllm_jdlora.jd.diag_sweeps import PADDING, Rows, State, begin, owners, run
from vllm_jdlora.jd.full import FullFit, fit_full
from vllm_jdlora.jd.problem import SliceProblem

# The core that is fitted is wider than the result: the best R columns need not lie in JD-Full's best R dimensions
# (energy lost by 32 real adapters in one slice, R 8: 0.776 at a core of 8, 0.761 at 16, 0.733 at 32, 0.732 at 64; with
# the last sweeps outside of it 1.5 R is as good as 2 R, R loses 0.2 % more).
_CORE, _LEAST_CORE = 1.5, 32
# It need not be a good fit itself, as the last sweeps leave it (125 synthetic adapters, R 64: the core of 4 range steps
# and 20 sweeps takes three times as long, and the result loses 0.1 % less).
_CORE_STEPS, _CORE_SWEEPS = 1, 1
# Starts that go on, and for how many sweeps more, before the best of them is taken.
_TRIALS = ((5, 5), (2, 15))
# Sweeps beyond the core, over the slice's own dimensions.
_LIFTED_SWEEPS = 5
# Shares of energy below this are rounding.
_NO_ENERGY = 1e-13
_CHUNK = 4096
# Columns of all clusters' bases multiplied at a time.
_COLUMNS = 512


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
    """Minimise Σ_i w_i‖ΔW_i − U diag(σ_i) V‖² by ridge-guarded alternating least squares.

    First on JD-Full's cores (CANDELINC): the best of several starts goes on: strongest rank-one terms of the adapters,
    JD-Full's own directions, the SVD of the mean, simultaneous diagonalisation, Gaussian (the authors'). Then a few
    sweeps in the slice's own space. A sweep is four products of the stacked factors with R columns; neither ΔW_i nor
    its core is ever formed.
    rank: R, columns of U. start: a JD-Full fit of this problem whose bases hold the result (default: one of rank
    max(1.5 R, 32), which they need not). Raises JDLoRAError for rank < 1.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    new = problem.a.new_zeros
    u, v = new(problem.bt.shape[1], rank), new(rank, problem.a.shape[1])
    sigma = new(len(problem), rank)
    if len(problem) == 0:
        return DiagFit(u, v, sigma, (0.0,))
    full = start or fit_full(
        problem, max(int(_CORE * rank), _LEAST_CORE), max_sweeps=_CORE_SWEEPS, range_steps=_CORE_STEPS
    )
    bases = full.u[:, : full.rank_out], full.v[: full.rank_in].T
    core = Rows.in_core(problem.with_stacks(*problem.times(*bases)))
    outside = max(0.0, problem.total - core.energy)
    state = _decompose(core, rank, max_sweeps)
    state = replace(state, a=bases[0].double() @ state.a, b=bases[1].double() @ state.b)
    objective = tuple(outside + remaining for remaining in state.objective)
    if start is None:
        state = run(Rows.of(problem), replace(state, objective=objective), min(_LIFTED_SWEEPS, max_sweeps))
        objective = state.objective

    energy, order = state.c.square().sum(0).sort(descending=True, stable=True)
    order = order[energy > _NO_ENERGY * energy[0]]
    kept = len(order)
    left, right = state.a[:, order], state.b[:, order]
    sign_left, sign_right = _signs(left), _signs(right)
    unit = problem.weights.sqrt() / problem.scale  # true scale -> as important as they are
    u[:, :kept] = (left * sign_left).to(u)
    v[:kept] = (right * sign_right).T.to(v)
    sigma[:, :kept] = (state.c[:, order] * sign_left * sign_right / unit[:, None]).to(sigma)
    return DiagFit(u, v, sigma, objective)


def refit_diag(problem: SliceProblem, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Best σ_i on the bases as stored: (UᵀU ∘ VVᵀ)⁺ diag(Uᵀ ΔW_i Vᵀ).

    u [d_out, R] and v [R, d_in] of any dtype, not orthonormal; zero columns get σ 0. Returns sigma [m, R] fp32 and
    ‖ΔW_i − u diag(σ_i) v‖_F² [m] fp64, both in true scale and member order; the error is that of the fp32 sigma.
    """
    left, right = u.double(), v.double().T
    owner = owners(problem)
    overlap = left.new_zeros(len(problem), left.shape[1])
    for at in range(0, problem.rows, _CHUNK):  # never a second copy of the stacks in fp64
        rows = slice(at, at + _CHUNK)
        overlap.index_add_(0, owner[rows], (problem.bt[rows].double() @ left) * (problem.a[rows].double() @ right))
    overlap = overlap * problem.scale[:, None]
    gram = (left.T @ left) * (right.T @ right)
    sigma = (overlap @ torch.linalg.pinv(gram, rtol=PADDING, hermitian=True)).float()
    exact = sigma.double()
    error = problem.squared_norms - 2 * (overlap * exact).sum(1) + ((exact @ gram) * exact).sum(1)
    return sigma, error.clamp_min(0)


def captured_diag(problem: SliceProblem, u: Tensor, v: Tensor) -> Tensor:
    """What each cluster's terms hold of each adapter's importance, [m, K] fp64, for u [K, d_out, R], v [K, R, d_in].

    w_i gᵢᵀ (UᵀU ∘ VVᵀ)⁺ gᵢ with gᵢ = diag(Uᵀ ΔW_i Vᵀ): products with the stacks in their dtype, all else in fp64.
    """
    clusters, _, rank = u.shape
    step, owner, parts = max(1, _COLUMNS // rank), owners(problem), []
    for k in range(0, clusters, step):
        left, right = u[k : k + step], v[k : k + step].mT
        z, t = problem.times(*(side.transpose(0, 1).flatten(1).to(problem.a) for side in (left, right)))
        overlap = problem.weights.new_zeros(len(problem), z.shape[1]).index_add_(0, owner, (z * t).double())
        left, right = left.double(), right.double()
        inverse = torch.linalg.pinv((left.mT @ left) * (right.mT @ right), rtol=PADDING, hermitian=True)
        by_cluster = overlap.unflatten(1, (-1, rank)).transpose(0, 1)
        parts.append(((by_cluster @ inverse) * by_cluster).sum(2).T)
    return torch.cat(parts, 1) * problem.weights[:, None]


def _decompose(rows: Rows, rank: int, max_sweeps: int) -> State:
    """CP of the rows' matrices with at most `rank` terms: the best start after a few sweeps, then to convergence."""
    tries = [begin(rows, a, b) for a, b in starts(rows, rank)]
    for kept, sweeps in _TRIALS:
        tries = sorted(tries, key=lambda tried: tried.objective[-1])[:kept]
        tries = [run(rows, tried, min(sweeps, max_sweeps - (len(tried.objective) - 1))) for tried in tries]
    best = min(tries, key=lambda tried: tried.objective[-1])
    return run(rows, best, max_sweeps - (len(best.objective) - 1))


def _signs(columns: Tensor) -> Tensor:
    """[columns] −1 where the largest entry is negative."""
    return torch.where(columns.gather(0, columns.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0)
