"""JD-Full of a whole collection: one cluster for each adapter over all slices, bases for each cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Clustering, Progress, alternate, refit
from vllm_jdlora.jd.problem import FactorSource, SliceProblem
from vllm_jdlora.jd.projection import refit_sigma
from vllm_jdlora.jd.start import candidate_starts

# Starts are compared on a few slices, drawn by seed, whose stacks stay in memory: at most so many slices and
# values.
_PROBES = 8
_PROBE_VALUES = 2**28
# Sweeps that tell a good start from a bad one, and rounds on the probes before all slices are read again.
_PROBE_SWEEPS = 2
_PROBE_ROUNDS = 5


@dataclass(frozen=True)
class CollectionFit:
    """The compressed collection: n adapters, S slices, K clusters, rank R; all on the CPU.

    Bases are in the storage dtype; `sigma` was refitted after the cast, so it belongs to exactly these bases.
    Columns of u and rows of v beyond a cluster's effective rank are zero.
    """

    cluster: Tensor  # [n] int64
    u: list[Tensor]  # for each slice [K, d_out, R]
    v: list[Tensor]  # for each slice [K, R, d_in]
    sigma: Tensor  # [n, S, R, R] fp32, s and norms folded in; zero where the adapter has nothing
    squared_norm: Tensor  # [n, S] fp64, ‖ΔW‖_F²
    squared_error: Tensor  # [n, S] fp64, ‖ΔW − UΣV‖_F² of the values returned
    rounds: int
    objective: list[float]  # ΣΣ ‖ΔW − UΣV‖²/‖ΔW‖² after each round, before the cast; never rises


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
    """Fit bases, assignment and scalings of all adapters of `source`, each of unit norm in each slice.

    rank: R, columns of each basis. clusters: K ≤ n. seed: draws the starts; the same seed and inputs give the
    same bits on one machine. max_rounds: refits between assignments. max_sweeps: Gauss–Seidel sweeps of the
    last refit. progress: called as (stage, done, total) with stages "start" (K > 1), "fit" (once or several
    times) and "store". dtype: of the bases returned.
    Raises JDLoRAError if rank, clusters, rounds or the factors do not make sense.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    if source.n < 1 or not source.slice_names:
        raise JDLoRAError("there is nothing to compress: give at least one adapter with one target module")
    if not 1 <= clusters <= source.n:
        raise JDLoRAError(f"{clusters} clusters for {source.n} adapters: give between 1 and {source.n}")
    if max_rounds < 1 or max_sweeps < 1:
        raise JDLoRAError(f"max_rounds {max_rounds}, max_sweeps {max_sweeps}: give at least 1 of each")
    report = progress or _quiet
    slices = _Slices(source)
    if clusters == 1:
        together = Clustering.unfitted(torch.zeros(source.n, dtype=torch.int64), 1)
        state = refit(slices, together, rank, max_sweeps, report)
    else:
        start = _best_start(slices, source.n, rank, clusters, seed, report)
        state = alternate(
            slices, start, clusters, rank=rank, max_rounds=max_rounds, max_sweeps=max_sweeps, report=report
        )
    return _store(slices, state, rank, dtype, report)


def _quiet(stage: str, done: int, total: int) -> None:
    pass


class _Slices(Sequence[SliceProblem]):
    """The source's slices, stacked anew at each access: only the current slice is held in memory."""

    def __init__(self, source: FactorSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.slice_names)

    @overload
    def __getitem__(self, index: int) -> SliceProblem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SliceProblem]: ...
    def __getitem__(self, index: int | slice) -> SliceProblem | Sequence[SliceProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._source.slice_names[index]
        factors = self._source.factors(index)
        if len(factors) != self._source.n:
            raise JDLoRAError(f"slice {name}: factors of {len(factors)} adapters, expected {self._source.n}")
        return SliceProblem.from_factors(factors, name)

    def __iter__(self) -> Iterator[SliceProblem]:
        return (self[index] for index in range(len(self)))


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
    slices: Sequence[SliceProblem], n: int, rank: int, clusters: int, seed: int, report: Progress
) -> Tensor:
    """Labels [n]: the candidate of least objective on the probe slices, after some rounds there."""
    probes = _probes(slices, seed)
    candidates = candidate_starts(probes, n, rank, clusters, seed)
    objectives = []
    for done, labels in enumerate(candidates):
        state = refit(probes, Clustering.unfitted(labels, clusters), rank, _PROBE_SWEEPS, _quiet)
        objectives.append(state.objective[-1])
        report("start", done + 1, len(candidates) + 1)
    best = candidates[objectives.index(min(objectives))]
    state = alternate(
        probes,
        best,
        clusters,
        rank=rank,
        max_rounds=_PROBE_ROUNDS,
        max_sweeps=_PROBE_SWEEPS,
        report=_quiet,
    )
    report("start", len(candidates) + 1, len(candidates) + 1)
    return state.cluster


def _store(
    slices: Sequence[SliceProblem], state: Clustering, rank: int, dtype: torch.dtype, report: Progress
) -> CollectionFit:
    """Cast the bases, refit Σ on them, measure the exact errors."""
    n = len(state.cluster)
    sigma = torch.zeros(n, len(slices), rank, rank)
    norm, error = (torch.zeros(n, len(slices), dtype=torch.float64) for _ in range(2))
    us, vs = ([basis.to(dtype) for basis in bases] for bases in (state.u, state.v))
    for index, (problem, u, v) in enumerate(zip(slices, us, vs, strict=True)):
        device = problem.a.device
        members = problem.members.cpu()
        norm[members, index] = problem.squared_norms.cpu()
        for k in range(state.clusters):
            positions = (state.cluster[members] == k).nonzero()[:, 0]
            at = members[positions]
            best, squared = refit_sigma(problem.subset(positions), u[k].to(device), v[k].to(device))
            sigma[at, index], error[at, index] = best.cpu(), squared.cpu()
        report("store", index + 1, len(slices))
    return CollectionFit(
        cluster=state.cluster,
        u=us,
        v=vs,
        sigma=sigma,
        squared_norm=norm,
        squared_error=error,
        rounds=len(state.objective),
        objective=state.objective,
    )
