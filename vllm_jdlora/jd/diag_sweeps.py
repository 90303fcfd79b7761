"""The sweeps of JD-Diag: alternating least squares of a CP form over stacked factors, no matrix ever formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.jd.cores import leading_directions
from vllm_jdlora.jd.problem import SliceProblem

# Directions of the Gram matrix of rank-one terms below this share of the strongest are zero padding.
PADDING = 1e-12
# Each update pays this share of the mean curvature for leaving its old value: near-parallel columns ("swamps") stay
# solvable, and unlike a plain ridge it cannot make the objective rise.
_RIDGE = 1e-6
# How slow sweeps must become, and how often in a row, to stop.
_SMALL_GAIN = 1e-4  # 1e-5 takes twice as long and lowers what 32 real adapters lose by 0.3 %
_CALM = 3


def owners(problem: SliceProblem) -> Tensor:
    """[P] position of the member that owns each row of the stacks."""
    ranks = torch.tensor(problem.ranks, dtype=torch.int64, device=problem.a.device)
    return torch.arange(len(problem), device=problem.a.device).repeat_interleave(ranks)


@dataclass(frozen=True)
class Rows:
    """Matrices X_i = Σ_r unit_r left_r right_rᵀ over the rows r that belong to i, m of them."""

    left: Tensor  # [P, p]
    right: Tensor  # [P, q]
    unit: Tensor  # [P, 1]
    owner: Tensor  # [P] int64
    m: int
    energy: float  # Σ_i‖X_i‖²

    @staticmethod
    def of(problem: SliceProblem) -> Rows:
        """X_i = √w_i ΔW_i."""
        owner = owners(problem)
        unit = problem.weights.sqrt()[owner, None].to(problem.a)
        return Rows(problem.bt, problem.a, unit, owner, len(problem), problem.total)

    @staticmethod
    def in_core(core: SliceProblem) -> Rows:
        """The same by singular directions, strongest first, the members' equally many (zero rows fill up)."""
        left, right, _ = leading_directions(core)
        m, rho = left.shape[:2]
        owner = torch.arange(m, device=core.a.device).repeat_interleave(rho)
        energy = float(left.double().square().sum())
        unit = core.a.new_ones(m * rho, 1)
        return Rows(left.flatten(0, 1).to(core.a), right.flatten(0, 1).to(core.a), unit, owner, m, energy)

    def out(self, a: Tensor) -> Tensor:
        """Rows' products with a [p, R]: [P, R]."""
        return self.left @ a.to(self.left)

    def into(self, b: Tensor) -> Tensor:
        """Rows' products with b [q, R]: [P, R]."""
        return self.right @ b.to(self.right)

    def sum_out(self, t: Tensor, c: Tensor) -> Tensor:
        """Σ_i X_i b diag(c_i) [p, R] fp64, from t = `into(b)` and c [m, R]."""
        return (self.left.T @ (t * self._spread(c))).double()

    def sum_in(self, z: Tensor, c: Tensor) -> Tensor:
        """Σ_i X_iᵀ a diag(c_i) [q, R] fp64, from z = `out(a)` and c [m, R]."""
        return (self.right.T @ (z * self._spread(c))).double()

    def overlap(self, z: Tensor, t: Tensor) -> Tensor:
        """diag(aᵀ X_i b) [m, R] fp64, from z = `out(a)` and t = `into(b)`."""
        products = (z * t * self.unit).double()
        return products.new_zeros(self.m, z.shape[1]).index_add_(0, self.owner, products)

    def _spread(self, c: Tensor) -> Tensor:
        return c.to(self.left)[self.owner] * self.unit


@dataclass(frozen=True)
class State:
    a: Tensor  # [p, columns] of unit norm, fp64 as all here
    b: Tensor  # [q, columns] of unit norm
    c: Tensor  # [m, columns]
    objective: tuple[float, ...]  # Σ_i‖X_i − A diag(c_i) Bᵀ‖²


def begin(rows: Rows, a: Tensor, b: Tensor) -> State:
    """The columns a [p, R] and b [q, R] at unit norm, with the best scalings for them."""
    a, b = (side / side.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny) for side in (a, b))
    overlap = rows.overlap(rows.out(a), rows.into(b))
    gram = (a.T @ a) * (b.T @ b)
    c = overlap @ torch.linalg.pinv(gram, rtol=PADDING, hermitian=True)
    return State(a, b, c, (_objective(rows, overlap, gram, c),))


def run(rows: Rows, state: State, sweeps: int) -> State:
    """At most so many sweeps more; fewer where they gain little. The objective never rises."""
    calm, floor = 0, 1e-6 * rows.m
    t = rows.into(state.b) if sweeps > 0 else None
    for _ in range(sweeps):
        assert t is not None
        improved, t = _sweep(rows, state, t)
        gain = state.objective[-1] - improved.objective[-1]
        if gain < 0:  # rounding at a fixed point
            break
        state = improved
        calm = calm + 1 if gain <= _SMALL_GAIN * max(state.objective[-1], floor) else 0
        if calm == _CALM:
            break
    return state


def _sweep(rows: Rows, state: State, t: Tensor) -> tuple[State, Tensor]:
    """A, then B with the new A, then C with both; norms go into C. t: `into(B)`, and that of the new B is returned."""
    a, b, c = state.a, state.b, state.c
    a = _update(rows.sum_out(t, c), (b.T @ b) * (c.T @ c), a)
    a, c = _into(a, c)
    z = rows.out(a)
    b = _update(rows.sum_in(z, c), (a.T @ a) * (c.T @ c), b)
    b, c = _into(b, c)
    t = rows.into(b)
    overlap, gram = rows.overlap(z, t), (a.T @ a) * (b.T @ b)
    c = _update(overlap, gram, c)
    return State(a, b, c, (*state.objective, _objective(rows, overlap, gram, c))), t


def _update(target: Tensor, gram: Tensor, old: Tensor) -> Tensor:
    """argmin ‖·‖² + λ‖new − old‖² of the least-squares problem new · gram = target."""
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    guarded = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve((target + ridge * old).T, torch.linalg.cholesky(guarded)).T


def _into(side: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit norm, their norms multiplied into c."""
    norms = side.norm(dim=0)
    return side / norms.clamp_min(torch.finfo(torch.float64).tiny), c * norms


def _objective(rows: Rows, overlap: Tensor, gram: Tensor, c: Tensor) -> float:
    return max(0.0, rows.energy - float(2 * (overlap * c).sum() - ((c @ gram) * c).sum()))
