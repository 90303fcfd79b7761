"""The clusters' alternation: refit each cluster's bases, move each adapter to the bases that capture most of it.

Paper, Appendix A.3, over any sequence of slices: all of a collection's, or the few on which starts are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.projection import captured_by_cluster

Progress = Callable[[str, int, int], None]

# Sweeps of a refit while assignments still move; the warm start carries the progress to the next round.
_SWEEPS_WHILE_MOVING = 4
# An adapter moves, or is worth a cluster of its own, only for a gain above this share of its norm: less is
# rounding.
_RELEVANT = 1e-6


@dataclass(frozen=True)
class Clustering:
    """n adapters in K clusters, the bases of each over S slices, and what they capture of each adapter."""

    cluster: Tensor  # [n] int64
    u: list[Tensor]  # for each fitted slice [K, d_out, R] fp32 on the CPU
    v: list[Tensor]  # for each fitted slice [K, R, d_in]
    captured: Tensor  # [n, K] fp64, Σ_slices w_i‖U_kᵀ ΔW_i V_k‖²
    weight: Tensor  # [n] fp64, Σ_slices of its importance = the most that can be captured
    changed: list[int]  # clusters whose members changed since their bases were fitted
    objective: list[float]  # Σ (weight − captured by the own cluster) after each refit

    @staticmethod
    def unfitted(cluster: Tensor, clusters: int) -> Clustering:
        """Labels [n] in 0..clusters-1, nothing fitted yet."""
        n = len(cluster)
        nothing = torch.zeros(n, clusters, dtype=torch.float64)
        return Clustering(cluster, [], [], nothing, nothing[:, 0], list(range(clusters)), [])

    @property
    def clusters(self) -> int:
        """K, empty ones included."""
        return self.captured.shape[1]

    def captured_by_own(self, cluster: Tensor) -> Tensor:
        """[n] what each adapter's cluster under the given labels captures of it."""
        return self.captured.gather(1, cluster[:, None])[:, 0]


def refit(
    slices: Sequence[SliceProblem], state: Clustering, rank: int, max_sweeps: int, report: Progress
) -> Clustering:
    """JD-Full of every changed cluster in every slice, warm-started, and what it captures of every adapter.

    A cluster with no member in a slice gets zero bases there.
    """
    captured, weight = state.captured.clone(), torch.zeros_like(state.weight)
    captured[:, state.changed] = 0
    changed = torch.tensor(state.changed)
    us: list[Tensor] = []
    vs: list[Tensor] = []
    for index, problem in enumerate(slices):
        device = problem.a.device
        members = problem.members.cpu()
        if state.u:
            u, v = state.u[index].clone(), state.v[index].clone()
        else:
            u = torch.zeros(state.clusters, problem.bt.shape[1], rank)
            v = torch.zeros(state.clusters, rank, problem.a.shape[1])
        for k in state.changed:
            positions = (state.cluster[members] == k).nonzero()[:, 0]
            start = (u[k].to(device), v[k].to(device)) if state.u else None
            fit = fit_full(problem.subset(positions), rank, start=start, max_sweeps=max_sweeps)
            u[k], v[k] = fit.u.cpu(), fit.v.cpu()
        shares = captured_by_cluster(problem, u[changed].to(device), v[changed].to(device)).cpu()
        captured[members[:, None], changed] += shares
        weight[members] += problem.importance.cpu()
        us.append(u)
        vs.append(v)
        report("fit", index + 1, len(slices))
    fitted = replace(state, u=us, v=vs, captured=captured, weight=weight, changed=[])
    remaining = float((weight - fitted.captured_by_own(state.cluster)).sum())
    return replace(fitted, objective=[*state.objective, max(0.0, remaining)])


def reassign(state: Clustering) -> Clustering:
    """Each adapter to the cluster that captures most of it; empty clusters take the worst-fitted adapters.

    A cluster stays empty when no adapter would gain from moving into it.
    """
    best, choice = state.captured.max(1)
    clearly = best > state.captured_by_own(state.cluster) + _RELEVANT * state.weight
    cluster = torch.where(clearly, choice, state.cluster)
    error = state.weight - state.captured_by_own(cluster)
    present = state.weight > 0
    for k in range(state.clusters):
        sizes = torch.bincount(cluster[present], minlength=state.clusters)
        movable = present & (sizes[cluster] > 1) & (error > _RELEVANT * state.weight)
        if sizes[k] == 0 and movable.any():
            worst = int(torch.where(movable, error, -1.0).argmax())
            cluster[worst], error[worst] = k, 0.0
    moved = cluster != state.cluster
    changed = torch.cat([state.cluster[moved], cluster[moved]]).unique().tolist()
    return replace(state, cluster=cluster, changed=changed)


def settle(
    slices: Sequence[SliceProblem],
    state: Clustering,
    rank: int,
    max_sweeps: int,
    report: Progress,
    rounds: Iterable[object],
) -> tuple[Clustering, Clustering | None]:
    """Refit and reassign, a round for each item of `rounds`, until no adapter moves or a refit raises the objective.

    Returns the labels that came out, and the last refit that was no worse than the one before; None without a round.
    """
    accepted: Clustering | None = None
    for _ in rounds:
        fitted = refit(slices, state, rank, max_sweeps, report)
        if accepted and fitted.objective[-1] > accepted.objective[-1]:
            return accepted, accepted
        accepted = fitted
        state = reassign(fitted)
        if not state.changed:
            break
    return state, accepted


def alternate(
    slices: Sequence[SliceProblem],
    cluster: Tensor,
    clusters: int,
    *,
    rank: int,
    max_rounds: int,
    max_sweeps: int,
    report: Progress,
) -> Clustering:
    """Refit and reassign from the labels `cluster` [n] until no adapter moves, at most `max_rounds` refits.

    The last refit runs to convergence. The objective never rises: a refit that raised it would be dropped.
    """
    unfitted = Clustering.unfitted(cluster, clusters)
    sweeps = min(max_sweeps, _SWEEPS_WHILE_MOVING)
    state, accepted = settle(slices, unfitted, rank, sweeps, report, range(max_rounds - 1))
    converged = refit(slices, replace(state, changed=list(range(clusters))), rank, max_sweeps, report)
    if accepted and converged.objective[-1] > accepted.objective[-1]:
        return accepted
    return converged
