"""Baselines as variants of the evaluation: each method's rank is the largest that its bytes allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.quantize import cast_of
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.adapter_slices import AdapterSlices, SliceSize
from vllm_jdlora.evaluation.share_packages import lorashare_variant, vlora_variant
from vllm_jdlora.evaluation.variant import Update, Variant
from vllm_jdlora.jd.baselines import BaselineFit, factor_pca, nothing_like, random_assignment, svd_each
from vllm_jdlora.jd.diag import fit_diag, refit_diag
from vllm_jdlora.jd.merging import average, ties
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.published import jd_published, published_labels

BYTES_A_NUMBER = 2
"""Everything counts as stored in bf16: every method's numbers, shared parts once."""

T = TypeVar("T")
Fit = Callable[[int, list[Factors | None]], BaselineFit]
"""(slice, its factors) → what the method makes of it."""
# The paper's choice (§6.5): up to so many adapters one cluster, above it clusters of this rank.
_UNCLUSTERED, _CLUSTER_RANK = 100, 16
# Random clusters: K is chosen on so many slices.
_PROBES = 4


def baseline(
    name: str,
    adapters: Sequence[Adapter],
    budget_bytes: int,
    *,
    second_moments: Mapping[str, Tensor] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Variant:
    """One of `BASELINES` for these adapters in at most `budget_bytes`, 2 bytes a number; held in memory in bf16.

    The rank is the largest, the same in all slices, that keeps the sum over slices within the budget. "jd-published"
    is the paper's: one cluster up to 100 adapters, above it rank 16 and as many clusters as fit;
    "jd-published-clusters" takes rank 16 and clusters at any number. "random-clusters" picks the number of clusters
    that loses least on four slices. "average" and "ties" are cut by SVD to fit. second_moments: slice name → C
    [d_in, d_in], for "svd-activation", "svd-fisher" and these in int8; gradients: slice name → G [d_out, d_out] for the
    latter (see `SliceMetric`). seed: draws of random starts and labels. progress:
    a bar on stderr.
    Raises JDLoRAError for another name, a budget too small for rank 1, missing second moments or a missing package.
    """
    if name in _PACKAGES:
        return _PACKAGES[name](adapters, budget_bytes // BYTES_A_NUMBER)
    if name not in _METHODS:
        raise JDLoRAError(f"no baseline named {name!r}: choose from {', '.join(BASELINES)}")
    slices = AdapterSlices(adapters)
    fit = _METHODS[name](
        _Job(name, slices, len(adapters), budget_bytes // BYTES_A_NUMBER, second_moments, gradients, seed, progress)
    )
    kept: dict[str, dict[str, tuple[Tensor, Tensor]]] = {adapter.name: {} for adapter in adapters}
    numbers = 0
    for index, part in _watched(enumerate(slices), len(slices), name, progress):
        done = fit(index, part)
        numbers += done.numbers
        rounded: dict[int, Tensor] = {}  # what adapters share stays shared
        for adapter, factors in zip(adapters, done.factors, strict=True):
            if factors is not None:
                for side in (factors.b, factors.a):
                    rounded.setdefault(id(side), side.bfloat16())
                kept[adapter.name][slices.names[index]] = (rounded[id(factors.b)], rounded[id(factors.a)])
    if BYTES_A_NUMBER * numbers > budget_bytes:
        raise JDLoRAError(f"{name}: stores {BYTES_A_NUMBER * numbers} bytes, more than the {budget_bytes} allowed")

    def update(adapter: str) -> Update:
        return {part: (b.float(), a.float()) for part, (b, a) in kept[adapter].items()}

    return Variant(name, BYTES_A_NUMBER * numbers, update)


class _Job:
    """What is asked for, and the largest rank or number of clusters that fits."""

    def __init__(
        self,
        name: str,
        slices: AdapterSlices,
        n: int,
        budget: int,
        second_moments: Mapping[str, Tensor] | None,
        gradients: Mapping[str, Tensor] | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.name, self.slices, self.n, self.budget = name, slices, n, budget
        self.second_moments, self.gradients = second_moments, gradients
        self.seed, self.progress = seed, progress

    def moments(self, of: Mapping[str, Tensor] | None, what: str) -> Mapping[str, Tensor]:
        """Raises JDLoRAError if a slice has none."""
        found = of or {}
        missing = [part for part in self.slices.names if part not in found]
        if missing:
            raise JDLoRAError(f"{self.name}: no second moment of the {what} of {missing[0]}; gather them on text")
        return found

    def rank(self, numbers: Callable[[SliceSize, int], int]) -> int:
        """Largest rank whose `numbers`, summed over slices, fit. Raises JDLoRAError if rank 1 does not."""
        total = partial(self._total, numbers)
        most = max(max(size.narrow, *size.ranks) for size in self.slices.sizes)
        found = _largest(lambda rank: total(rank) <= self.budget, most)
        if found == 0:
            raise JDLoRAError(
                f"{self.name}: rank 1 takes {BYTES_A_NUMBER * total(1)} bytes, more than the "
                f"{BYTES_A_NUMBER * self.budget} allowed; give it more"
            )
        return found

    def joint_rank(self, clusters: int) -> int:
        return self.rank(lambda size, rank: _joint(size, rank, clusters))

    def most_clusters(self, rank: int) -> int:
        """Largest K of bases of this rank that fit; 0 if one does not."""
        total = self._total
        return _largest(lambda k: total(lambda size, r: _joint(size, r, k), rank) <= self.budget, self.n)

    def _total(self, numbers: Callable[[SliceSize, int], int], rank: int) -> int:
        return sum(numbers(size, rank) for size in self.slices.sizes)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Largest whole number up to `most` that fits, 0 if 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _joint(size: SliceSize, rank: int, clusters: int) -> int:
    """Numbers of JD-Full: K pairs of bases, R² for each adapter."""
    return min(clusters, len(size.ranks)) * rank * size.sides + len(size.ranks) * rank**2


def _svd(size: SliceSize, rank: int) -> int:
    return sum(min(rank, rho) for rho in size.ranks) * size.sides


def _svd_fit(job: _Job, numbers: Callable[[SliceSize, int], int] = _svd) -> Fit:
    rank = job.rank(numbers)
    return lambda index, factors: svd_each(factors, rank)


def _svd_activation_fit(job: _Job, numbers: Callable[[SliceSize, int], int] = _svd) -> Fit:
    rank, moments, names = job.rank(numbers), job.moments(job.second_moments, "input"), job.slices.names
    return lambda index, factors: svd_each(factors, rank, second_moment=moments[names[index]])


def _svd_fisher_fit(job: _Job, numbers: Callable[[SliceSize, int], int] = _svd) -> Fit:
    rank, moments, names = job.rank(numbers), job.moments(job.second_moments, "input"), job.slices.names
    gradients = job.moments(job.gradients, "gradients")
    return lambda index, factors: svd_each(
        factors, rank, second_moment=moments[names[index]], gradients=gradients[names[index]]
    )


def _in_8_bits(of: Callable[[_Job, Callable[[SliceSize, int], int]], Fit]) -> Callable[[_Job], Fit]:
    """An SVD of each adapter in int8: half a number (of 2 bytes) for each value, 4 bytes for each direction's scale."""

    def method(job: _Job) -> Fit:
        plain = of(job, lambda size, rank: math.ceil(_svd(size, rank) / 2 + 4 * _directions(size, rank)))

        def fit(index: int, factors: list[Factors | None]) -> BaselineFit:
            found = plain(index, factors)
            cast = cast_of("int8", torch.bfloat16)
            eight = [None if f is None else Factors(cast(f.b.T).T, cast(f.a)) for f in found.factors]
            directions = sum(f.a.shape[0] for f in eight if f is not None)
            return BaselineFit(eight, math.ceil(found.numbers / 2 + 4 * directions))

        return fit

    return method


def _directions(size: SliceSize, rank: int) -> int:
    return sum(min(rank, rho) for rho in size.ranks)


def _diag_fit(job: _Job) -> Fit:
    rank = job.rank(lambda size, r: r * (size.sides + len(size.ranks)))

    def fit(index: int, factors: list[Factors | None]) -> BaselineFit:
        problem = SliceProblem.from_factors(factors, job.slices.names[index])
        found = fit_diag(problem, rank)
        u, v = found.u.bfloat16().float(), found.v.bfloat16().float()
        sigma, _ = refit_diag(problem, u, v)
        kept = nothing_like(factors)
        for row, member in zip(sigma, problem.members.tolist(), strict=True):
            kept[member] = Factors(u * row, v)
        return BaselineFit(kept, u.numel() + v.numel() + sigma.numel())

    return fit


def _published_fit(job: _Job) -> Fit:
    return _published_clusters_fit(job) if job.n > _UNCLUSTERED else _published_one(job)


def _published_one(job: _Job) -> Fit:
    rank = job.joint_rank(1)
    return lambda index, factors: jd_published(factors, rank, seed=job.seed)


def _published_clusters_fit(job: _Job) -> Fit:
    clusters = job.most_clusters(_CLUSTER_RANK)
    if clusters < 2:
        return _published_one(job)
    bar = tqdm(total=0, desc=f"{job.name}: {clusters} clusters", disable=not job.progress)

    def report(done: int, most: int) -> None:
        bar.total = most
        bar.update(done - bar.n)

    labels = published_labels(job.slices, _CLUSTER_RANK, clusters, seed=job.seed, report=report)
    bar.close()
    return lambda index, factors: jd_published(factors, _CLUSTER_RANK, labels=labels, seed=job.seed)


def _pca_fit(job: _Job) -> Fit:
    rank = job.rank(lambda size, r: r * size.sides + 2 * r * sum(size.ranks))
    return lambda index, factors: factor_pca(factors, rank)


def _merged(size: SliceSize, rank: int) -> int:
    return min(min(rank, size.narrow) * size.sides, size.d_out * size.d_in)


def _average_fit(job: _Job) -> Fit:
    rank = job.rank(_merged)
    return lambda index, factors: average(factors, rank)


def _ties_fit(job: _Job) -> Fit:
    rank = job.rank(_merged)
    return lambda index, factors: ties(factors, rank)


def _random_fit(job: _Job) -> Fit:
    """1, 2, 4, … clusters, each with the largest rank that fits; the number that loses least on the probes."""
    chosen, least = (0, 0), float("inf")
    step = max(1, len(job.slices) // _PROBES)
    probes = [job.slices[i] for i in range(step // 2, len(job.slices), step)][:_PROBES]
    options = [2**exponent for exponent in range(job.n.bit_length()) if 2**exponent < job.n] or [1]
    for clusters in _watched(options, len(options), f"{job.name}: number of clusters", job.progress):
        try:
            rank = job.joint_rank(clusters)
        except JDLoRAError:
            break  # more clusters take more yet
        lost = sum(_lost(factors, random_assignment(factors, rank, clusters, job.seed)) for factors in probes)
        if lost < least:
            chosen, least = (clusters, rank), lost
    clusters, rank = chosen if chosen[1] else (1, job.joint_rank(1))
    return lambda index, factors: random_assignment(factors, rank, clusters, job.seed)


def _lost(factors: list[Factors | None], fit: BaselineFit) -> float:
    """Σ_i ‖ΔW_i − ΔŴ_i‖²/‖ΔW_i‖² over adapters with something in the slice."""
    total = 0.0
    for f, kept in zip(factors, fit.factors, strict=True):
        if f is not None and kept is not None:
            delta = f.b @ f.a
            total += float((delta - kept.b @ kept.a).square().sum() / delta.square().sum().clamp_min(1e-30))
    return total


def _watched(steps: Sequence[T] | enumerate[T], total: int, title: str, progress: bool) -> tqdm:
    return tqdm(steps, total=total, desc=title, unit="slice", disable=not progress)


_METHODS: dict[str, Callable[[_Job], Fit]] = {
    "svd": _svd_fit,
    "svd-activation": _svd_activation_fit,
    "svd-int8": _in_8_bits(_svd_fit),
    "svd-activation-int8": _in_8_bits(_svd_activation_fit),
    "svd-fisher": _svd_fisher_fit,
    "svd-fisher-int8": _in_8_bits(_svd_fisher_fit),
    "jd-diag": _diag_fit,
    "jd-published": _published_fit,
    "jd-published-clusters": _published_clusters_fit,
    "factor-pca": _pca_fit,
    "average": _average_fit,
    "ties": _ties_fit,
    "random-clusters": _random_fit,
}
_PACKAGES: dict[str, Callable[[Sequence[Adapter], int], Variant]] = {
    "vlora": vlora_variant,
    "lorashare": lorashare_variant,
}
BASELINES = (*_METHODS, *_PACKAGES)
"""Names that `baseline` knows."""
