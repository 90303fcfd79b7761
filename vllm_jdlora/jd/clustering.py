"""JD of a whole collection: one cluster for each adapter, found on a few slices, then passes over all slices.

Paper, Appendix A.3, arranged so that one slice's factors are in memory at a time. Each pass reads every slice once and
hands what became of it to a store; a store that keeps it on disk makes the fit resumable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Progress, alternate, reassign
from vllm_jdlora.jd.passes import FitStore, MemoryStore, MetricOf, Pass, Slices, finished_pass, loaded, run_pass
from vllm_jdlora.jd.problem import FactorSource, SliceProblem
from vllm_jdlora.jd.search import best_assignment
from vllm_jdlora.jd.slice_fit import SliceFit, SliceRecipe

# Starts are compared on a few slices, drawn by seed, whose stacks stay in memory: at most so many slices and
# values.
_PROBES = 8
_PROBE_VALUES = 2**28
# More adapters than this are grouped at this rank at most: a search costs in proportion to it, and bases that hold
# several families at once tell less about who belongs where.
_MANY, _RANK_OF_MANY = 128, 16
# Sweeps that tell a good start from a bad one, and rounds on the probes before all slices are read again.
_PROBE_SWEEPS = 2
_PROBE_ROUNDS = 5
# Another pass over all slices must promise to lower the remaining error by this share of it.
_WORTH_A_PASS = 1e-3


@dataclass(frozen=True)
class CollectionFit:
    """The compressed collection: n adapters, S slices. Bases and Σ stay in the store, one slice at a time."""

    cluster: Tensor  # [n] int64
    squared_norm: Tensor  # [n, S] fp64, ‖ΔW‖_F²
    squared_error: Tensor  # [n, S] fp64, ‖ΔW − UΣV‖_F² of the values as stored
    output_norm: Tensor | None  # [n, S] fp64, both in the metric, where there is one
    output_error: Tensor | None
    passes: int  # over all slices, one that was dropped included
    objective: list[float]  # Σ of squared relative errors after each accepted pass, times slices; falls
    slice: Callable[[int], SliceFit]  # by position


def fit_collection(
    source: FactorSource,
    recipe: SliceRecipe,
    *,
    clusters: int,
    seed: int = 0,
    max_passes: int = 4,
    effort: float = 1.0,
    metric_of: MetricOf | None = None,
    store: FitStore | None = None,
    slices: Slices | None = None,
    progress: Progress | None = None,
) -> CollectionFit:
    """Fit bases, assignment and scalings of all adapters of `source`: least Σ_i of their squared relative errors.

    clusters: K ≤ n. seed: draws the starts; the same seed and inputs give the same bits on one machine with one number
    of threads. effort: of the search for clusters (`best_assignment`). max_passes: over all slices; there is another
    while adapters gain clearly from moving. store: where slices are kept; one that holds part of this very fit is gone
    on with, to the same bits. slices: `weighted_slices` of the same, where they are known; what these hold is let go
    before the first pass. progress: called as (stage, done, total) with stages "start" (K > 1), "fit" and "refit N".
    Raises JDLoRAError if clusters, passes or the factors do not make sense.
    """
    check_settings(source, clusters, max_passes)
    report = progress or _quiet
    store = store or MemoryStore()
    slices = slices or weighted_slices(source, metric_of, seed)
    number = len(store.accepted())
    if number == 0:
        if store.cluster(0) is None:
            store.begin(0, assignment(slices, recipe.rank, clusters, seed, report, effort))
        slices.held.clear()
        best = run_pass(slices, recipe, clusters, store, 0, range(clusters), report)
        store.accept(0, best.objective)
        number = 1
    else:
        slices.held.clear()
        best = finished_pass(slices, clusters, store, number - 1)
    while number < max_passes:
        proposed = reassign(best.clustering())
        if not proposed.changed or _promised(best, proposed.cluster) <= _WORTH_A_PASS * best.remaining:
            break
        if store.cluster(number) is None:
            store.begin(number, proposed.cluster)
        again = run_pass(slices, recipe, clusters, store, number, proposed.changed, report)
        number += 1
        if again.objective >= best.objective:
            break
        best = again
        store.accept(best.number, best.objective)
    kept = best.number
    return CollectionFit(
        cluster=best.cluster,
        squared_norm=best.squared_norm,
        squared_error=best.squared_error,
        output_norm=best.output_norm,
        output_error=best.output_error,
        passes=number,
        objective=store.accepted(),
        slice=lambda index: loaded(store, kept, index),
    )


def check_settings(source: FactorSource, clusters: int, max_passes: int = 1) -> None:
    """Raises JDLoRAError for what `fit_collection` would refuse before it reads any factors."""
    if source.n < 1 or not source.slice_names:
        raise JDLoRAError("there is nothing to compress: give at least one adapter with one target module")
    if not 1 <= clusters <= source.n:
        raise JDLoRAError(f"{clusters} clusters for {source.n} adapters: give between 1 and {source.n}")
    if max_passes < 1:
        raise JDLoRAError(f"max_passes {max_passes}: give at least 1")


def assignment(slices: Slices, rank: int, clusters: int, seed: int, report: Progress, effort: float = 1.0) -> Tensor:
    """Labels [n] int64 in 0..clusters−1, from a few of the slices held in memory. effort: of `best_assignment`."""
    if clusters == 1:
        return torch.zeros(slices.n, dtype=torch.int64)
    rank = min(rank, _RANK_OF_MANY) if slices.n > _MANY else rank
    probes = probe_slices(slices, seed)
    labels = best_assignment(probes, slices.n, rank, clusters, seed, report, effort=effort)
    state = alternate(
        probes, labels, clusters, rank=rank, max_rounds=_PROBE_ROUNDS, max_sweeps=_PROBE_SWEEPS, report=_quiet
    )
    return state.cluster


def weighted_slices(source: FactorSource, metric_of: MetricOf | None, seed: int) -> Slices:
    """The source's slices, each adapter as important in one as its share of the adapter's energy, by the probes.

    The probes that fit in memory are held, so that `probe_slices` and who measures errors on them need not read again.
    """
    slices = Slices(source, metric_of)
    return slices.weighted_by(probe_positions(len(slices), seed), _PROBE_VALUES)


def probe_positions(slices: int, seed: int) -> list[int]:
    """Positions of the slices, of so many, on which clusters are searched: fewer are used where they are large."""
    return torch.randperm(slices, generator=torch.Generator().manual_seed(seed)).tolist()[:_PROBES]


def probe_slices(slices: Slices, seed: int) -> list[SliceProblem]:
    """Slices on which clusters are searched, held in memory: those that `weighted_slices` holds, else read again."""
    if slices.held:
        return list(slices.held.values())
    probes: list[SliceProblem] = []
    values = 0
    for index in probe_positions(len(slices), seed):
        probe = slices[index]
        values += probe.bt.numel() + probe.a.numel()
        if probes and values > _PROBE_VALUES:
            break
        probes.append(probe)
    return probes


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def _promised(before: Pass, cluster: Tensor) -> float:
    """Energy that the proposed labels capture more, on bases as they are; a cluster that was empty may take all."""
    moved = cluster != before.cluster
    empty = torch.bincount(before.cluster[before.weight > 0], minlength=before.captured.shape[1]) == 0
    own = before.captured.gather(1, before.cluster[:, None])[:, 0]
    then = before.captured.gather(1, cluster[:, None])[:, 0].where(~empty[cluster], before.weight)
    return float((then - own)[moved].sum())
