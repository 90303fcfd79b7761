"""The search for the clusters' assignment: starts, steps that each raise the captured energy, splits and merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from vllm_jdlora.jd.alternation import Clustering, Progress, refit
from vllm_jdlora.jd.cores import Cores
from vllm_jdlora.jd.exchange import (
    Evaluator,
    Group,
    groups_of,
    improve_by_exchange,
    improve_in_bulk,
    labels_of,
)
from vllm_jdlora.jd.one_thread import one_thread
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.start import balanced_groups, candidate_starts, similarities, similarity_of

# Nominal seconds of one core: for any collection, and for each adapter.
_SECONDS, _SECONDS_EACH = 20.0, 0.12
# The best starts are improved with this share of the time, the best of those with the rest.
_STARTS, _STARTS_SHARE = 3, 0.5
# Single changes are verified one by one where trying each adapter in each near cluster takes at most this share.
_EXACT_SHARE = 0.25
# Directions that hold this share of the energy are left out while a start loses more than that: they hardly decide
# who belongs where, and fits cost the square of the directions kept.
_IGNORED = (0.04, 0.004, 0.0)
# Pairs of clusters that are tried merged, and clusters that are tried split.
_MERGES, _SPLITS = 6, 2
# Sweeps of the last comparison, on the slices themselves.
_SWEEPS = 4
_TICKS = 100
# Starts of more adapters than these are compared less thoroughly where many numbers of clusters are tried.
_FEW = 128


def best_assignment(
    probes: Sequence[SliceProblem],
    n: int,
    rank: int,
    clusters: int,
    seed: int,
    report: Progress,
    *,
    effort: float = 1.0,
) -> Tensor:
    """Labels [n] int64 in 0..clusters−1 of least joint error on the probe slices that the search finds.

    Maximises Σ_k Σ_slices Σ_{i in k} w_i‖U_kᵀ ΔW_i V_k‖² over the labels, U_k and V_k the joint bases of rank `rank`
    of k's members (paper, Appendix A.3, which alternates instead). Never worse on the probes than the best of the
    starts. Empty clusters take adapters as long as that gains. effort: 1 is a few ten seconds of one core for some
    tens of adapters, some minutes for a thousand; 0 only compares the starts. report: called as ("start", done, 100).
    The same inputs and seed give the same labels on one machine.
    """
    return Search(probes, n, seed).assignment(rank, clusters, report, effort=effort)


def single_member_clusters(labels: Tensor, clusters: int) -> list[int]:
    """Clusters with exactly one of the adapters with these labels [n].

    Bases for one adapter alone share nothing: at ranks near the adapter's own they cost as many bytes as the adapter
    itself, which kept plain has no error.
    """
    return (torch.bincount(labels, minlength=clusters) == 1).nonzero()[:, 0].tolist()


class Search:
    """What searches for different numbers of clusters on the same probe slices have in common, computed once."""

    def __init__(self, probes: Sequence[SliceProblem], n: int, seed: int) -> None:
        self._probes, self._n, self._seed = probes, n, seed
        self._alike: dict[int, list[Tensor]] = {}  # by rank
        self._cores: tuple[tuple[float, int], Cores] | None = None  # the last: of a thousand adapters they are large
        self._better: int | None = None  # of the two kinds of similarity, for many adapters

    def assignment(self, rank: int, clusters: int, report: Progress, *, effort: float = 1.0) -> Tensor:
        """As `best_assignment`. With effort 0, many adapters' starts are compared on the smallest of the probes, and
        after the first comparison only starts by the kind of similarity that won it."""
        if clusters == 1 or not self._probes:
            return torch.zeros(self._n, dtype=torch.int64)
        if clusters >= self._n:
            return torch.arange(self._n)
        with one_thread():
            roughly = effort == 0 and self._n > _FEW
            labels = self._compared(rank, clusters) if roughly else self._searched(rank, clusters, report, effort)
        report("start", _TICKS, _TICKS)
        return labels

    def _searched(self, rank: int, clusters: int, report: Progress, effort: float) -> Tensor:
        n, probes = self._n, self._probes
        kinds = self._similarities(rank)
        starts = [groups_of(labels, clusters) for labels in candidate_starts(kinds, n, clusters, self._seed)]
        for ignored in _IGNORED:
            evaluator = Evaluator(self._leading(ignored, probes), rank, effort * (_SECONDS + _SECONDS_EACH * n))
            found = best_start = max(starts, key=evaluator.total)
            if evaluator.most - evaluator.total(best_start) > ignored * evaluator.most:
                break
        evaluator.spent = 0.0
        if effort > 0:
            similarity = kinds[-1] if kinds else similarity_of(probes, n)
            found = _search(evaluator, starts, similarity, self._seed, _Ticks(evaluator, report))
        if found == best_start:
            return labels_of(found, n)
        # The search saw leading directions only; the slices themselves have the last word.
        after, before = (
            refit(probes, Clustering.unfitted(labels_of(groups, n), clusters), rank, _SWEEPS, _quiet).objective[-1]
            for groups in (found, best_start)
        )
        return labels_of(found if after <= before else best_start, n)

    def _compared(self, rank: int, clusters: int) -> Tensor:
        kinds = self._similarities(rank)
        offered = kinds if self._better is None else [kinds[self._better]]
        starts = candidate_starts(offered, self._n, clusters, self._seed)
        smallest = min(self._probes, key=lambda probe: probe.bt.numel() + probe.a.numel())
        evaluator = Evaluator(self._leading(_IGNORED[0], [smallest]), rank, 0.0)
        totals = [evaluator.total(groups_of(labels, clusters)) for labels in starts]
        best = totals.index(max(totals))
        if self._better is None and kinds:
            self._better = best * len(kinds) // len(starts)
        return starts[best]

    def _similarities(self, rank: int) -> list[Tensor]:
        if rank not in self._alike:
            self._alike[rank] = similarities(self._probes, self._n, rank)
        return self._alike[rank]

    def _leading(self, ignored: float, probes: Sequence[SliceProblem]) -> Cores:
        key = ignored, len(probes)
        if self._cores is None or self._cores[0] != key:
            self._cores = None  # before the next, not beside it
            self._cores = key, Cores(probes, self._n, ignored)
        return self._cores[1]


class _Ticks:
    """Progress in hundredths of the budget."""

    def __init__(self, evaluator: Evaluator, report: Progress) -> None:
        self._evaluator, self._report = evaluator, report

    def __call__(self) -> None:
        done = self._evaluator.spent / max(self._evaluator.budget, 1e-9)
        self._report("start", min(_TICKS - 1, 1 + int(_TICKS * done)), _TICKS)


def _search(
    evaluator: Evaluator, starts: Sequence[list[Group]], similarity: Tensor, seed: int, advance: Callable[[], None]
) -> list[Group]:
    cores, budget = evaluator.cores, evaluator.budget
    clusters = len(starts[0])
    largest = max(len(group) for groups in starts for group in groups)
    exact = cores.n * min(clusters, 9) * cores.seconds(min(largest, -(-cores.n // clusters) + 1))
    ranked = sorted(starts, key=evaluator.total, reverse=True)[:_STARTS]
    if exact > _EXACT_SHARE * budget:
        best = improve_in_bulk(evaluator, ranked[0], similarity, budget, advance)
        return improve_by_exchange(evaluator, best, similarity, budget, advance, exact=False)
    improved = []
    for number, groups in enumerate(ranked):
        until = _STARTS_SHARE * budget * (number + 1) / len(ranked)
        improved.append(improve_by_exchange(evaluator, groups, similarity, until, advance))
    best = improve_by_exchange(evaluator, max(improved, key=evaluator.total), similarity, budget, advance)
    draw = torch.Generator().manual_seed(seed)
    while evaluator.spent < budget:
        regrouped = _split_and_merge(evaluator, best, similarity, draw)
        if regrouped is None:
            break
        tried = improve_by_exchange(evaluator, regrouped, similarity, budget, advance)
        if evaluator.total(tried) <= evaluator.total(best) + evaluator.least:
            break
        best = tried
    return best


def _split_and_merge(
    evaluator: Evaluator, groups: list[Group], similarity: Tensor, draw: torch.Generator
) -> list[Group] | None:
    """The two clusters that lose least together merged, and the cluster that gains most split in two.

    None if there are no three clusters to do it with. The total may fall: exchanges follow.
    """
    energies = evaluator.energies(groups)
    held = [k for k, group in enumerate(groups) if group]
    pairs = sorted(combinations(held, 2), key=lambda pair: -_between(similarity, groups, pair))[:_MERGES]
    together = evaluator.energies([tuple(sorted(groups[a] + groups[b])) for a, b in pairs])
    most = [float(evaluator.cores.weight[list(group)].sum()) for group in groups]
    error = [weight - energy for weight, energy in zip(most, energies, strict=True)]
    split = [k for k in sorted(held, key=lambda k: -error[k]) if len(groups[k]) > 1][:_SPLITS]
    halves = []
    for k in split:
        members = torch.tensor(groups[k])
        halved = balanced_groups(similarity[members][:, members], 2, draw)
        halves.append(tuple(tuple(members[halved == side].tolist()) for side in range(2)))
    options = []
    for (a, b), joint in zip(pairs, together, strict=True):
        for k, (first, second) in zip(split, halves, strict=True):
            if k not in (a, b):
                gain = joint - energies[a] - energies[b] + evaluator.total([first, second]) - energies[k]
                options.append((gain, a, b, k, first, second))
    if not options:
        return None
    _, a, b, k, first, second = max(options)
    changed = list(groups)
    changed[a], changed[b], changed[k] = tuple(sorted(groups[a] + groups[b])), first, second
    return changed


def _between(similarity: Tensor, groups: Sequence[Group], pair: tuple[int, int]) -> float:
    a, b = pair
    return float(similarity[list(groups[a])][:, list(groups[b])].mean())


def _quiet(stage: str, done: int, total: int) -> None:
    pass
