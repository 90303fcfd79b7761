"""Two-sided certificates of a joint fit's error: what no bases of a rank can beat, and what the HOSVD start keeps.

With M_U = Σ w ΔW ΔWᵀ, M_V = Σ w ΔWᵀΔW and τ the tails of their spectra beyond R (HOSVD, De Lathauwer et al., 2000):
max(τ_U, τ_V) ≤ error²_optimal ≤ error²_HOSVD ≤ τ_U + τ_V ≤ 2·error²_optimal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.cores import leading_directions
from vllm_jdlora.jd.problem import SliceProblem

# Only a dense eigensolver gives all of a tail, and it takes a second at this size; larger ones are not certified.
_LARGEST_CORE = 1024
# Rows whose inner products fit in memory (134 MB in fp64).
_LARGEST_GRAM = 4096


@dataclass(frozen=True)
class Certificate:
    """Bounds of the least squared error of joint fits, over adapters and slices of importance `weight` in all."""

    lower: float  # no U, V of the rank have less
    upper: float  # the HOSVD start, and every fit that is at least as good, has no more
    weight: float

    @property
    def relative(self) -> tuple[float, float]:
        """Both bounds as a relative error (root of the mean of the squared one over adapters and slices, weighted)."""
        if self.weight == 0:
            return 0.0, 0.0
        return (self.lower / self.weight) ** 0.5, (self.upper / self.weight) ** 0.5


def certify(problem: SliceProblem, rank: int) -> Certificate | None:
    """Bounds of Σ_i w_i‖ΔW_i − UΣ_iV‖² over all U, V of rank R in one slice, all members in one cluster.

    lower is the largest of four bounds: both tails, the members' own truncated SVDs Σ_i Σ_{j>R} w_iσ_j², and,
    as the Σ_i span R² dimensions at most, the tail beyond R² of the Gram matrix of the adapters (paper, Theorem 1).
    None where a side of the core, min(P, d), is above 1024. Computed in fp64 on the CPU. Raises JDLoRAError for
    rank < 1.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    if len(problem) == 0:
        return Certificate(0.0, 0.0, 0.0)
    if any(min(stack.shape) > _LARGEST_CORE for stack in (problem.bt, problem.a)):
        return None
    core = problem.with_stacks(*(_core(stack.double()) for stack in (problem.bt, problem.a)))
    tails = [
        _tail(gram(torch.eye(stack.shape[1], dtype=torch.float64, device=stack.device)), rank)
        for gram, stack in ((core.full_gram_out, core.bt), (core.full_gram_in, core.a))
    ]
    lower = max(*tails, _own_floors(core, rank), _gram_tail(core, rank))
    upper = sum(tails)
    return Certificate(min(lower, upper), upper, problem.total)  # they may cross by rounding


def certify_clusters(slices: Iterable[SliceProblem], cluster: Tensor, rank: int) -> Certificate | None:
    """The sum of `certify` over slices and over the clusters that labels [n] int64 make; None if any part has none."""
    lower = upper = weight = 0.0
    for problem in slices:
        labels = cluster[problem.members.cpu()]
        for k in labels.unique():
            part = certify(problem.subset((labels == k).nonzero()[:, 0].to(problem.members.device)), rank)
            if part is None:
                return None
            lower, upper, weight = lower + part.lower, upper + part.upper, weight + part.weight
    return Certificate(lower, upper, weight)


def _core(stack: Tensor) -> Tensor:
    """Stack [P, d] in an orthonormal basis of its own rows, [P, min(P, d)]: inner products stay as they are."""
    return torch.linalg.qr(stack.T, mode="r").R.T if stack.shape[0] < stack.shape[1] else stack


def _tail(gram: Tensor, skipped: int) -> float:
    """Sum of all eigenvalues but the `skipped` largest."""
    values = torch.linalg.eigvalsh((gram + gram.T) / 2).flip(0).clamp_min(0)
    return float(values[skipped:].sum())


def _own_floors(core: SliceProblem, rank: int) -> float:
    left = leading_directions(core)[0]
    return float(left[:, rank:].double().square().sum())


def _gram_tail(core: SliceProblem, rank: int) -> float:
    """Σ_{j>R²} λ_j of K_ij = ⟨ΔW_i, ΔW_j⟩ √w_i √w_j [m, m]."""
    m = len(core)
    if m <= rank**2 or core.rows > _LARGEST_GRAM:
        return 0.0
    products = (core.bt @ core.bt.T) * (core.a @ core.a.T)
    owner = torch.repeat_interleave(torch.arange(m), torch.tensor(core.ranks)).to(products.device)
    gram = products.new_zeros(m, core.rows).index_add_(0, owner, products)
    gram = gram.new_zeros(m, m).index_add_(1, owner, gram)
    roots = core.weights.sqrt()
    return _tail(gram * roots[:, None] * roots, rank**2)
