"""JD-Full of a whole collection: one cluster for each adapter over all slices, one pair of bases for each cluster.

Alternates refit (JD-Full of each cluster, warm-started) and assignment (each adapter to the cluster whose bases
capture most of it, summed over slices); the paper's Appendix A.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import FactorSource, SliceProblem
from vllm_jdlora.jd.projection import captured_by_cluster, refit_sigma
from vllm_jdlora.jd.start import feature_sets, kmeans

Progress = Callable[[str, int, int], None]

# Starts are tried on a few slices, drawn by seed, whose stacks stay in memory: at most this many slices and values.
_PROBES = 8
_PROBE_VALUES = 2**28
_PROBE_ROUNDS = 4
# Sweeps for each refit while assignments still move; the warm start carries the progress to the next round.
_SWEEPS_WHILE_MOVING = 4
# An adapter moves, or is worth a cluster of its own, only for a gain above this share of its norm: less is rounding.
_RELEVANT = 1e-6


@dataclass(frozen=True)
class CollectionFit:
    """The compressed collection: n adapters, S slices, K clusters, rank R.

    Bases are in the storage dtype; `sigma` was refitted after the cast, so it belongs to exactly these bases. Columns
    of u and rows of v beyond a cluster's effective rank are zero.
    """

    cluster: Tensor  # [n] int64
    u: list[Tensor]  # for each slice [K, d_out, R]
    v: list[Tensor]  # for each slice [K, R, d_in]
    sigma: Tensor  # [n, S, R, R] fp32, s and norms folded in; zero where the adapter has nothing
    squared_norm: Tensor  # [n, S] fp64, ‖ΔW‖_F²
    squared_error: Tensor  # [n, S] fp64, ‖ΔW − UΣV‖_F² of the values returned
    rounds: int
    objective: list[
        float
    ]  # Σ_slices Σ_i ‖ΔW_i − UΣ_iV‖²/‖ΔW_i‖² after each round, before the cast; never rises


def fit_collection(
    source: FactorSource,
    *,
    rank: int,
    clusters: int,
    seed: int = 0,
    max_rounds: int = 10,
    max_sweeps: int = 20,
    progress: Progress | None = None,
    dtype: torch.dtype = torch.float32,
) -> CollectionFit:
    """Fit bases, assignment and scalings of all adapters of `source`, every adapter of unit norm in each slice.

    rank: R, columns of each basis. clusters: K ≤ n. seed: draws the starts; the same seed and inputs give the same
    bits on one machine. max_rounds: refit + assignment rounds. max_sweeps: Gauss–Seidel sweeps of the last refit.
    progress: called as (stage, done, total). dtype: of the bases returned. Results are on the CPU.
    Raises JDLoRAError if rank, clusters, rounds or the factors do not make sense.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    if source.n < 1 or not source.slice_names:
        raise JDLoRAError("there is nothing to compress: give at least one adapter with one target module")
    if not 1 <= clusters <= source.n:
        raise JDLoRAError(
            f"{clusters} clusters for {source.n} adapters: give between 1 and {source.n} (fewer than the adapters, "
            "or nothing is shared)"
        )
    if max_rounds < 1 or max_sweeps < 1:
        raise JDLoRAError(f"max_rounds {max_rounds}, max_sweeps {max_sweeps}: give at least 1 of each")
    report = progress or (lambda stage, done, total: None)
    slices = _Slices(source)
    everyone = torch.zeros(source.n, dtype=torch.int64)
    if clusters == 1:
        fit = _refit(slices, _unfitted(everyone, 1, len(slices)), rank, max_sweeps, report)
    else:
        probes = _probes(slices, seed)
        start = _best_start(probes, source.n, rank, clusters, seed, report)
        fit = _alternate(slices, start, clusters, rank, max_rounds, max_sweeps, report)
    return _store(slices, fit, rank, dtype, report)


class _Slices(Sequence[SliceProblem]):
    """The source's slices, stacked anew at each access: nothing but the current slice is held in memory."""

    def __init__(self, source: FactorSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.slice_names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        name = self._source.slice_names[index]
        factors = self._source.factors(index)
        if len(factors) != self._source.n:
            raise JDLoRAError(f"slice {name}: factors of {len(factors)} adapters, expected {self._source.n}")
        return SliceProblem.from_factors(factors, name)

    def __iter__(self) -> Iterator[SliceProblem]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class _Fit:
    """Bases fp32 on the CPU, and what they capture of each adapter, summed over slices."""

    cluster: Tensor  # [n]
    u: list[Tensor | None]
    v: list[Tensor | None]
    captured: Tensor  # [n, K] fp64
    weight: (
        Tensor  # [n] fp64, number of slices where the adapter has something = the most that can be captured
    )
    changed: list[int]  # clusters whose members changed since their bases were fitted
    objective: list[float]


def _unfitted(cluster: Tensor, clusters: int, slices: int) -> _Fit:
    n = len(cluster)
    return _Fit(
        cluster=cluster,
        u=[None] * slices,
        v=[None] * slices,
        captured=torch.zeros(n, clusters, dtype=torch.float64),
        weight=torch.zeros(n, dtype=torch.float64),
        changed=list(range(clusters)),
        objective=[],
    )


def _refit(slices: Sequence[SliceProblem], fit: _Fit, rank: int, sweeps: int, report: Progress) -> _Fit:
    """JD-Full of every changed cluster in every slice, and what the new bases capture of every adapter."""
    clusters = fit.captured.shape[1]
    captured, weight = fit.captured.clone(), torch.zeros_like(fit.weight)
    captured[:, fit.changed] = 0
    us: list[Tensor | None] = []
    vs: list[Tensor | None] = []
    for index, (problem, old_u, old_v) in enumerate(zip(slices, fit.u, fit.v, strict=True)):
        members = problem.members.cpu()
        if old_u is None or old_v is None:
            u = torch.zeros(clusters, problem.bt.shape[1], rank)
            v = torch.zeros(clusters, rank, problem.a.shape[1])
        else:
            u, v = old_u.clone(), old_v.clone()
        for k in fit.changed:
            positions = (fit.cluster[members] == k).nonzero()[:, 0]
            warm = None if old_u is None else (u[k].to(problem.a.device), v[k].to(problem.a.device))
            one = fit_full(problem.subset(positions), rank, start=warm, max_sweeps=sweeps)
            u[k], v[k] = one.u.cpu(), one.v.cpu()
        weight[members] += 1
        if clusters == 1 or fit.changed:
            new = captured_by_cluster(
                problem, u[fit.changed].to(problem.a.device), v[fit.changed].to(problem.a.device)
            ).cpu()
            captured[members[:, None], torch.tensor(fit.changed)] += new
        us.append(u)
        vs.append(v)
        report("fit", index + 1, len(slices))
    own = captured.gather(1, fit.cluster[:, None])[:, 0]
    objective = max(0.0, float((weight - own).sum()))
    return replace(
        fit,
        u=us,
        v=vs,
        captured=captured,
        weight=weight,
        changed=[],
        objective=[*fit.objective, objective],
    )


def _reassign(fit: _Fit) -> _Fit:
    """Each adapter to the cluster that captures most of it; empty clusters take the worst-fitted adapters."""
    own = fit.captured.gather(1, fit.cluster[:, None])[:, 0]
    best, choice = fit.captured.max(1)
    cluster = torch.where(best > own + _RELEVANT * fit.weight, choice, fit.cluster)
    error = fit.weight - fit.captured.gather(1, cluster[:, None])[:, 0]
    present = fit.weight > 0
    for k in range(fit.captured.shape[1]):
        sizes = torch.bincount(cluster[present], minlength=fit.captured.shape[1])
        if sizes[k] > 0:
            continue
        movable = present & (sizes[cluster] > 1) & (error > _RELEVANT * fit.weight)
        if not movable.any():
            break
        worst = int(torch.where(movable, error, -1.0).argmax())
        cluster[worst], error[worst] = k, 0.0
    moved = cluster != fit.cluster
    changed = torch.cat([fit.cluster[moved], cluster[moved]]).unique().tolist()
    return replace(fit, cluster=cluster, changed=changed)


def _alternate(
    slices: Sequence[SliceProblem],
    cluster: Tensor,
    clusters: int,
    rank: int,
    max_rounds: int,
    max_sweeps: int,
    report: Progress,
) -> _Fit:
    """Refit and reassign until no adapter moves, then one refit to convergence. The objective never rises."""
    fit = _unfitted(cluster, clusters, len(slices))
    for _ in range(max_rounds - 1):
        fitted = _refit(slices, fit, rank, min(max_sweeps, _SWEEPS_WHILE_MOVING), report)
        if fitted.objective[-1] > min(fit.objective, default=float("inf")):
            fit = previous
            break
        previous = fitted
        fit = _reassign(fitted)
        if not fit.changed:
            break
    polished = _refit(slices, replace(fit, changed=list(range(clusters))), rank, max_sweeps, report)
    if polished.objective[-1] > min(fit.objective, default=float("inf")):
        return previous
    return polished


def _probes(slices: Sequence[SliceProblem], seed: int) -> list[SliceProblem]:
    order = torch.randperm(len(slices), generator=torch.Generator().manual_seed(seed)).tolist()
    probes: list[SliceProblem] = []
    values = 0
    for index in order[:_PROBES]:
        probe = slices[index]
        values += probe.bt.numel() + probe.a.numel()
        if probes and values > _PROBE_VALUES:
            break
        probes.append(probe)
    return probes


def _best_start(
    probes: list[SliceProblem], n: int, rank: int, clusters: int, seed: int, report: Progress
) -> Tensor:
    """The k-means start [n] that leads to the least objective on the probe slices after a few rounds."""
    candidates = [
        kmeans(features, clusters, torch.Generator().manual_seed(seed + draw))
        for features in feature_sets(probes, n, rank)
        for draw in range(_draws(n))
    ]
    best: _Fit | None = None
    quiet: Progress = lambda stage, done, total: None  # noqa: E731
    for done, labels in enumerate(candidates):
        fit = _alternate(probes, labels, clusters, rank, _PROBE_ROUNDS, _SWEEPS_WHILE_MOVING, quiet)
        if best is None or fit.objective[-1] < best.objective[-1]:
            best = fit
        report("start", done + 1, len(candidates))
    assert best is not None
    return best.cluster


def _draws(n: int) -> int:
    """k-means draws for each kind of feature: local optima are worth more tries where tries are cheap."""
    return 4 if n <= 128 else 1


def _store(slices: _Slices, fit: _Fit, rank: int, dtype: torch.dtype, report: Progress) -> CollectionFit:
    """Cast the bases, refit Σ on them, measure the exact errors."""
    n, clusters = fit.captured.shape
    sigma = torch.zeros(n, len(slices), rank, rank)
    norm, error = (torch.zeros(n, len(slices), dtype=torch.float64) for _ in range(2))
    us, vs = [], []
    for index, problem in enumerate(slices):
        u, v = fit.u[index], fit.v[index]
        assert u is not None and v is not None
        us.append(u.to(dtype))
        vs.append(v.to(dtype))
        members = problem.members.cpu()
        norm[members, index] = problem.squared_norms.cpu()
        for k in range(clusters):
            positions = (fit.cluster[members] == k).nonzero()[:, 0]
            at = members[positions]
            bases = us[-1][k].to(problem.a.device), vs[-1][k].to(problem.a.device)
            best, squared = refit_sigma(problem.subset(positions), *bases)
            sigma[at, index], error[at, index] = best.cpu(), squared.cpu()
        report("store", index + 1, len(slices))
    return CollectionFit(
        cluster=fit.cluster,
        u=us,
        v=vs,
        sigma=sigma,
        squared_norm=norm,
        squared_error=error,
        rounds=len(fit.objective),
        objective=fit.objective,
    )
