"""Probe slices cut down to each adapter's leading directions: what joint bases of any set of adapters would capture.

A search over assignments fits thousands of small sets of adapters. Here a set of m adapters is a stack of m·t rows
(t leading directions of each), reduced to an m·t square core (paper.md's exact core reduction, by Cholesky of the
Gram matrix), and many sets in all slices are fitted as one batch of small matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.jd.problem import SliceProblem

# Gram matrices of all directions of all adapters are kept up to this size; beyond, those of each set are made anew.
_KEPT_GRAM = 2048
# Cores up to this size; larger sets stay in the slice's own coordinates.
_LARGEST_CORE = 512
# A dense eigensolver up to this size, subspace iteration beyond.
_DENSE = 384
_RANGE_STEPS = 3
# Gauss–Seidel sweeps after the HOSVD start: the second adds less than 0.1 % of the energy that is lost.
_SWEEPS = 2
# Values of one batch of cores.
_BATCH_VALUES = 2**23


@dataclass(frozen=True)
class Bases:
    """Joint bases of one set of adapters over all slices, and what they capture."""

    members: Tensor  # [m] int64
    u: list[Tensor]  # for each slice [p, R], orthonormal up to rounding
    v: list[Tensor]  # for each slice [q, R]
    captured: Tensor  # [m] fp64, Σ_slices w_i‖Uᵀ ΔW_i V‖² of the leading directions


class Cores:
    """n adapters in S slices by their t leading directions: unit-norm ΔW_i ≈ left_iᵀ right_i.

    ignored: share of the energy, on average over adapters, that directions beyond t may hold.
    """

    def __init__(self, probes: Sequence[SliceProblem], n: int, ignored: float) -> None:
        self.n = n
        sides = [leading_directions(probe, ignored) for probe in probes]
        self.t = max((self_t for _, _, self_t in sides), default=1)
        self.left, self.right = [], []
        self.weight = torch.zeros(n, dtype=torch.float64)  # [n] the most that can be captured
        for probe, (left, right, _) in zip(probes, sides, strict=True):
            members = probe.members.cpu()
            self.weight[members] += probe.importance.cpu()
            self.left.append(_placed(left, members, n, self.t))
            self.right.append(_placed(right, members, n, self.t))
        self._grams: tuple[Tensor, Tensor] | None = None
        if n * self.t <= _KEPT_GRAM:
            self._grams = (_grams(self.left), _grams(self.right))

    def seconds(self, m: int) -> float:
        """Nominal time of fitting one set of m adapters on one core; a rule of thumb to budget a search with."""
        rows = m * self.t
        core = min(rows, _LARGEST_CORE)
        return len(self.left) * (1e-4 + 2.8e-7 * core**2 * (1 + core / 800)) * rows / core

    def captured(self, sets: Tensor, rank: int) -> Tensor:
        """[c, m] fp64: what joint bases of rank `rank` of each set (row of `sets` [c, m]) capture of each member."""
        parts = []
        rows = sets.shape[1] * self.t
        batch = max(1, _BATCH_VALUES // max(1, len(self.left) * rows * min(rows, _LARGEST_CORE)))
        for chunk in sets.split(batch):
            total = torch.zeros(chunk.shape, dtype=torch.float64)
            for x, y, _ in self._coordinates(chunk):
                total += _fit(x, y, self.t, rank)[2].sum(0)
            parts.append(total)
        return torch.cat(parts)

    def bases(self, members: Tensor, rank: int) -> Bases:
        """Joint bases of one set, in the slices' own coordinates."""
        us, vs = [], []
        total = torch.zeros(len(members), dtype=torch.float64)
        for x, y, at in self._coordinates(members[None]):
            u, v, captured = _fit(x, y, self.t, rank)
            total += captured[:, 0].sum(0)
            for s, index in enumerate(at):
                us.append(_lifted(self.left[index][members].flatten(0, 1), x[s, 0], u[s, 0]))
                vs.append(_lifted(self.right[index][members].flatten(0, 1), y[s, 0], v[s, 0]))
        return Bases(members, us, vs, total)

    def captured_by(self, bases: Bases, adapters: Tensor) -> Tensor:
        """[m'] fp64: what given bases capture of the given adapters."""
        total = torch.zeros(len(adapters), dtype=torch.float64)
        for left, right, u, v in zip(self.left, self.right, bases.u, bases.v, strict=True):
            z, t = left[adapters] @ u, right[adapters] @ v
            total += (z.mT @ t).flatten(1).square().sum(1, dtype=torch.float64)
        return total

    def _coordinates(self, sets: Tensor) -> list[tuple[Tensor, Tensor, list[int]]]:
        """(x, y, slices) of batches of slices: x, y [S', c, m·t, size] rows of the sets' members."""
        everything = list(range(len(self.left)))
        if sets.shape[1] * self.t > _LARGEST_CORE:
            return [
                (self.left[s][sets].flatten(1, 2)[None], self.right[s][sets].flatten(1, 2)[None], [s])
                for s in everything
            ]
        if self._grams is not None:
            rows = (sets[:, :, None] * self.t + torch.arange(self.t)).flatten(1)
            grams = [g[:, rows[:, :, None], rows[:, None, :]] for g in self._grams]
        else:
            grams = []
            for side in (self.left, self.right):
                stacks = (each[sets].flatten(1, 2) for each in side)
                grams.append(torch.stack([stack @ stack.mT for stack in stacks]))
        x, y = (_cholesky(g) for g in grams)
        return [(x, y, everything)]


def leading_directions(probe: SliceProblem, ignored: float = 0.0) -> tuple[Tensor, Tensor, int]:
    """(left [m, ρ, d_out], right [m, ρ, d_in], t) on the CPU: ΔW_i√w_i = leftᵀ right by its SVD, strongest rows first.

    Rows of right are orthonormal, those of left orthogonal with the singular values as lengths; zero rows beyond an
    adapter's rank. The first t rows hold all but the share `ignored` of the energy on average.
    """
    widest = max(probe.ranks, default=1)
    left, right = (side.new_zeros(len(probe), widest, side.shape[1], device="cpu") for side in (probe.bt, probe.a))
    energy = torch.zeros(len(probe), widest, dtype=torch.float64)
    for rho in sorted(set(probe.ranks)):
        at = [i for i, each in enumerate(probe.ranks) if each == rho]  # contiguous: members are sorted by rank
        rows = slice(probe.offsets[at[0]], probe.offsets[at[-1] + 1])
        bt, a = (side[rows].unflatten(0, (-1, rho)) for side in (probe.bt, probe.a))
        (q_out, r_out), (q_in, r_in) = (torch.linalg.qr(side.mT) for side in (bt, a))
        scaled = r_out.double() @ r_in.double().mT * probe.weights[at].sqrt()[:, None, None]
        u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
        size = s.shape[1]
        left[at, :size] = ((q_out @ u.to(q_out.dtype)).mT * s[:, :, None].to(q_out.dtype)).cpu()
        right[at, :size] = (vh.to(q_in.dtype) @ q_in.mT).cpu()
        energy[at, :size] = s.square().cpu()
    held = energy.sum(0).cumsum(0) / energy.sum().clamp_min(1e-300) if len(probe) else torch.ones(1)
    return left, right, min(int((held < 1 - ignored - 1e-12).sum()) + 1, widest)


def _placed(rows: Tensor, members: Tensor, n: int, t: int) -> Tensor:
    out = rows.new_zeros(n, t, rows.shape[2])
    kept = rows[:, :t]
    out[members, : kept.shape[1]] = kept
    return out


def _grams(stacks: Sequence[Tensor]) -> Tensor:
    """[S, n·t, n·t] inner products of all rows."""
    return torch.stack([stack.flatten(0, 1) @ stack.flatten(0, 1).T for stack in stacks])


def _cholesky(gram: Tensor) -> Tensor:
    """L with L Lᵀ = gram (up to a little on the diagonal that keeps deficient ones regular)."""
    tiny = 1e-10 if gram.dtype == torch.float64 else 1e-6
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    lift = tiny * diagonal.mean(-1, keepdim=True) + 1e-30
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(lift.expand_as(diagonal))).L


def _fit(x: Tensor, y: Tensor, t: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bases u [..., p, r], v [..., q, r] of stacks x [..., m·t, p], y [..., m·t, q]; captured [..., m] fp64.

    Sequentially truncated HOSVD, then Gauss–Seidel sweeps, as jd/full.py does for one slice.
    """
    v = _top(y * x.square().sum(-1, keepdim=True).sqrt(), rank)
    right = (y @ v).unflatten(-2, (-1, t))
    root = torch.linalg.cholesky_ex(right @ right.mT + 1e-12 * torch.eye(t, dtype=x.dtype)).L
    u = _top((root.mT @ x.unflatten(-2, (-1, t))).flatten(-3, -2), rank)
    left = (x @ u).unflatten(-2, (-1, t))
    for _ in range(_SWEEPS):
        u = _orthonormal(x.mT @ (right @ (right.mT @ left)).flatten(-3, -2))
        left = (x @ u).unflatten(-2, (-1, t))
        v = _orthonormal(y.mT @ (left @ (left.mT @ right)).flatten(-3, -2))
        right = (y @ v).unflatten(-2, (-1, t))
    return u, v, (left.mT @ right).flatten(-2).square().sum(-1, dtype=torch.float64)


def _top(rows: Tensor, rank: int) -> Tensor:
    """Leading right singular vectors [..., size, min(rank, size)] of rows [..., P, size]."""
    size = rows.shape[-1]
    width = min(size, rank + 8)
    if size <= max(_DENSE, 2 * width):
        return torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., -rank:].flip(-1)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(size, width, generator=draw).to(rows).expand(*rows.shape[:-2], -1, -1)
    for _ in range(_RANGE_STEPS):
        basis = torch.linalg.qr(rows.mT @ (rows @ basis)).Q
    projected = rows @ basis
    return basis @ torch.linalg.eigh(projected.mT @ projected).eigenvectors[..., -rank:].flip(-1)


def _orthonormal(columns: Tensor) -> Tensor:
    """The columns [..., size, r] made orthonormal by Cholesky; never longer than 1, so energies are never too high."""
    columns = columns / columns.square().sum(-2, keepdim=True).sqrt().clamp_min(1e-30)
    factor = _cholesky(columns.mT @ columns)
    return torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)


def _lifted(rows: Tensor, core: Tensor, basis: Tensor) -> Tensor:
    """A core's basis [size, r] in the slice's own space [p, r]; rows [m·t, p] = core · (orthonormal rows)."""
    if core.shape[1] == rows.shape[1] and rows.shape[0] > _LARGEST_CORE:
        return basis
    lifted = rows.T @ torch.linalg.solve_triangular(core.T, basis, upper=True)
    return _orthonormal(lifted)
