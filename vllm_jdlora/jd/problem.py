"""One slice's adapters in factored form: inner products and products with ΔW_i that never form ΔW_i."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError

# Stacks up to so many rows and values are kept in fp64: they are cheap, and errors near zero stay meaningful. Larger
# ones stay in fp32 (the adapters' own precision), with fp64 sums.
_ROWS_IN_FP64 = 4096
_VALUES_IN_FP64 = 2**23
# ‖BA‖² below this share of ‖B‖²‖A‖² is rounding of fp32 factors: the adapter has nothing in this slice.
_NOTHING = 1e-14


@dataclass(frozen=True)
class Factors:
    """ΔW = b · a of one adapter in one slice: b [d_out, ρ], a [ρ, d_in], fp32, the scale s folded into b."""

    b: Tensor
    a: Tensor

    def __post_init__(self) -> None:
        if self.b.ndim != 2 or self.a.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise JDLoRAError(
                f"factors of shapes {list(self.b.shape)} and {list(self.a.shape)} do not multiply: "
                "give b [d_out, rank] and a [rank, d_in]"
            )


class FactorSource(Protocol):
    """Where the factors come from, one slice at a time; `factors` may be called several times for a slice."""

    @property
    def n(self) -> int:
        """Number of adapters."""

    @property
    def slice_names(self) -> Sequence[str]:
        """Names of the slices, in the order of `slice_index`."""

    def factors(self, slice_index: int) -> list[Factors | None]:
        """One entry for each adapter; None where the adapter has nothing in this slice."""


def squared_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖b a‖_F² = ⟨bᵀb, a aᵀ⟩ for b [d_out, ρ], a [ρ, d_in]: fp64 scalar, never negative."""
    b, a = b.double(), a.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)


def squared_error(b: Tensor, a: Tensor, u: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
    """‖b a − u σ v‖_F² in factored form: fp64 scalar.

    b [d_out, ρ], a [ρ, d_in], u [d_out, R], sigma [R, R], v [R, d_in]; u and v need not be orthonormal. The three
    terms are summed in fp64, so relative (unsquared) errors down to about 1e-8 are meaningful.
    """
    b, a, u, sigma, v = b.double(), a.double(), u.double(), sigma.double(), v.double()
    cross = (((u.T @ b) @ (a @ v.T)) * sigma).sum()
    approximation = (((u.T @ u) @ sigma) * (sigma @ (v @ v.T))).sum()
    return (squared_norm(b, a) - 2 * cross + approximation).clamp_min(0)


@dataclass(frozen=True)
class SliceProblem:
    """The adapters that have something in one slice, stacked. m members, P = Σρ_i rows.

    Factors are scaled by powers of two (no rounding) so that no product over- or underflows: the true ΔW_i is
    `scale[i]` times the stacked one. Members are sorted by rank, so that equal ranks form one batch without padding.
    The weights are importance/‖ΔW_i‖² of the stacked factors: with an importance of 1 every adapter counts as if of
    unit norm, with others as if its squared norm were that.
    """

    bt: Tensor  # [P, d_out] rows of B_iᵀ
    a: Tensor  # [P, d_in] rows of A_i
    ranks: tuple[int, ...]  # [m] ρ_i, ascending
    members: Tensor  # [m] int64, position of each in the collection
    weights: Tensor  # [m] fp64
    scale: Tensor  # [m] fp64, powers of two
    importance: Tensor  # [m] fp64

    @staticmethod
    def from_factors(factors: Sequence[Factors | None], name: str) -> SliceProblem:
        """Stack what each adapter has in the slice `name` (one entry for each adapter, None = nothing).

        Adapters whose product is zero are left out. Raises JDLoRAError if no adapter has factors, if shapes differ
        or if values are not finite.
        """
        present = [(i, f) for i, f in enumerate(factors) if f is not None]
        if not present:
            raise JDLoRAError(f"slice {name}: no adapter has factors there; leave the slice out")
        d_out, d_in = present[0][1].b.shape[0], present[0][1].a.shape[1]
        present.sort(key=lambda entry: entry[1].a.shape[0])
        rows = sum(f.a.shape[0] for _, f in present)
        small = rows <= _ROWS_IN_FP64 and rows * (d_out + d_in) <= _VALUES_IN_FP64
        dtype = torch.float64 if small else torch.float32
        bts, rights, ranks, members, weights, scale = [], [], [], [], [], []
        for index, f in present:
            if f.b.shape[0] != d_out or f.a.shape[1] != d_in:
                raise JDLoRAError(
                    f"slice {name}: adapter {index} is [{f.b.shape[0]}, {f.a.shape[1]}], others are "
                    f"[{d_out}, {d_in}]; compress adapters of one base model only"
                )
            norm_b, norm_a = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (f.b, f.a))
            if not math.isfinite(norm_b * norm_a):
                raise JDLoRAError(f"slice {name}: adapter {index} has values that are not finite; leave it out")
            if norm_b == 0 or norm_a == 0:
                continue
            exponent_b, exponent_a = math.frexp(norm_b)[1], math.frexp(norm_a)[1]
            bt = (f.b.double() * 2.0**-exponent_b).T
            a = f.a.double() * 2.0**-exponent_a
            square = float(squared_norm(bt.T, a))
            if square <= _NOTHING:
                continue
            bts.append(bt.to(dtype))
            rights.append(a.to(dtype))
            ranks.append(a.shape[0])
            members.append(index)
            weights.append(1 / square)
            scale.append(2.0 ** (exponent_b + exponent_a))
        device = present[0][1].b.device
        return SliceProblem(
            bt=torch.cat([torch.zeros(0, d_out, dtype=dtype, device=device), *bts]),
            a=torch.cat([torch.zeros(0, d_in, dtype=dtype, device=device), *rights]),
            ranks=tuple(ranks),
            members=torch.tensor(members, dtype=torch.int64, device=device),
            weights=torch.tensor(weights, dtype=torch.float64, device=device),
            scale=torch.tensor(scale, dtype=torch.float64, device=device),
            importance=torch.ones(len(ranks), dtype=torch.float64, device=device),
        )

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def rows(self) -> int:
        """P = Σρ_i."""
        return self.a.shape[0]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """[m + 1] first row of each member, then P."""
        offsets = [0]
        for rank in self.ranks:
            offsets.append(offsets[-1] + rank)
        return tuple(offsets)

    @cached_property
    def _batches(self) -> list[tuple[slice, int]]:
        """(rows, ρ) of each run of members of equal rank."""
        batches, first = [], 0
        for position in range(1, len(self) + 1):
            if position == len(self) or self.ranks[position] != self.ranks[first]:
                batches.append((slice(self.offsets[first], self.offsets[position]), self.ranks[first]))
                first = position
        return batches

    @cached_property
    def _row_weights(self) -> Tensor:
        """[P, 1] weight of the member that owns the row."""
        repeats = torch.tensor(self.ranks, dtype=torch.int64, device=self.weights.device)
        return self.weights.repeat_interleave(repeats).to(self.a.dtype)[:, None]

    def stacked_squared_norms(self) -> Tensor:
        """[m] fp64, ‖B_iA_i‖_F² of the stacks as they are."""
        parts = [self.weights.new_zeros(0)]
        for at, rho in self._batches:
            bts, rights = (stack[at].double().unflatten(0, (-1, rho)) for stack in (self.bt, self.a))
            parts.append(((bts @ bts.mT) * (rights @ rights.mT)).flatten(1).sum(1))
        return torch.cat(parts).clamp_min(0)

    @property
    def squared_norms(self) -> Tensor:
        """[m] fp64, ‖ΔW_i‖_F² in true scale."""
        return self.scale.square() * self.importance / self.weights

    @property
    def total(self) -> float:
        """Σ_i w_i‖ΔW_i‖²: what bases that lose nothing capture."""
        return float(self.importance.sum())

    def with_stacks(self, bt: Tensor, a: Tensor) -> SliceProblem:
        """The same members in other coordinates: bt [P, p'], a [P, q']."""
        return SliceProblem(bt, a, self.ranks, self.members, self.weights, self.scale, self.importance)

    def in_shares_of(self, energies: Tensor) -> SliceProblem:
        """The same members, each as important as its squared norm is in units of its own in `energies` [n] fp64.

        Then errors count as they do in ‖ΔW − UΣV‖²/‖ΔW‖² over all slices together, if `energies` are those of the
        adapters' mean slices (paper.md §6.8: the weights of one budget over modules). Adapters without any: as if of
        unit norm.
        """
        own = energies.to(self.weights)[self.members]
        norms = self.squared_norms
        shares = torch.where(own > 0, norms / own, torch.ones_like(norms))
        return replace(self, weights=self.weights / self.importance * shares, importance=shares)

    def subset(self, positions: Tensor) -> SliceProblem:
        """Only the members at these ascending positions [m'] (positions in this problem, not in the collection)."""
        chosen = positions.tolist()
        if len(chosen) == len(self):
            return self
        spans = [torch.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen]
        rows = torch.cat([torch.zeros(0, dtype=torch.int64), *spans]).to(self.a.device)
        return SliceProblem(
            bt=self.bt[rows],
            a=self.a[rows],
            ranks=tuple(self.ranks[i] for i in chosen),
            members=self.members[positions],
            weights=self.weights[positions],
            scale=self.scale[positions],
            importance=self.importance[positions],
        )

    def times(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(Z, T) = (B_iᵀU, A_iV) row-stacked, [P, r_u] and [P, r_v], for column bases u [d_out, r_u], v [d_in, r_v]."""
        return self.bt @ u, self.a @ v

    def sigmas(self, z: Tensor, t: Tensor) -> Tensor:
        """Uᵀ ΔW_i V of the stacked (unscaled) adapters: [m, r_u, r_v]."""
        parts = [z[at].unflatten(0, (-1, rho)).mT @ t[at].unflatten(0, (-1, rho)) for at, rho in self._batches]
        return torch.cat([z.new_zeros(0, z.shape[1], t.shape[1]), *parts])

    def energies(self, z: Tensor, t: Tensor) -> Tensor:
        """What orthonormal bases capture of each adapter's importance: w_i‖Uᵀ ΔW_i V‖², [m] fp64."""
        return self.sigmas(z, t).flatten(1).double().square().sum(1) * self.weights

    def energies_by_block(self, z: Tensor, t: Tensor, rank: int) -> Tensor:
        """`energies` of several bases at once: z, t [P, K·rank] hold K blocks of columns; [m, K] fp64."""
        parts = []
        for at, rho in self._batches:
            zs, ts = (x[at].unflatten(0, (-1, rho)).unflatten(2, (-1, rank)).transpose(1, 2) for x in (z, t))
            parts.append((zs.mT @ ts).flatten(2).double().square().sum(2))
        return torch.cat([self.weights.new_zeros(0, z.shape[1] // rank), *parts]) * self.weights[:, None]

    def gram_step_out(self, z: Tensor, t: Tensor) -> Tensor:
        """Σ_i w_i ΔW_i V Vᵀ ΔW_iᵀ U [d_out, r_u], from z = BᵀU and t = A V."""
        return self.bt.T @ self.through_own(t, z)

    def gram_step_in(self, z: Tensor, t: Tensor) -> Tensor:
        """Σ_i w_i ΔW_iᵀ U Uᵀ ΔW_i V [d_in, r_v], from z = BᵀU and t = A V."""
        return self.a.T @ self.through_own(z, t)

    def full_gram_out(self, u: Tensor) -> Tensor:
        """Σ_i w_i ΔW_i ΔW_iᵀ u [d_out, r] for u [d_out, r]."""
        return self.bt.T @ self.through_own(self.a, self.bt @ u)

    def full_gram_in(self, v: Tensor) -> Tensor:
        """Σ_i w_i ΔW_iᵀ ΔW_i v [d_in, r] for v [d_in, r]."""
        return self.a.T @ self.through_own(self.bt, self.a @ v)

    def through_own(self, x: Tensor, y: Tensor) -> Tensor:
        """Row-stacked w_i X_i X_iᵀ Y_i, [P, columns of y], in the cheaper order of products."""
        out = torch.empty_like(y)
        for at, rho in self._batches:
            xs, ys = x[at].unflatten(0, (-1, rho)), y[at].unflatten(0, (-1, rho))
            product = xs @ (xs.mT @ ys) if x.shape[1] < rho else (xs @ xs.mT) @ ys
            out[at] = product.flatten(0, 1)
        return out * self._row_weights
