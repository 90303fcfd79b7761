"""A collection's fit: what is returned is true, the alternation never makes it worse, families are found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.jd.dense import ListSource, dense, family_factors, hooi, random_factors, unit
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd import alternation, clustering, passes
from vllm_jdlora.jd.alternation import Clustering, alternate, reassign, refit
from vllm_jdlora.jd.clustering import CollectionFit, fit_collection
from vllm_jdlora.jd.passes import MemoryStore
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.slice_fit import SliceFit, SliceRecipe

LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]  # families of five, three and two


def silent(stage: str, done: int, total: int) -> None:
    pass


def families(noise: float = 0.05, slices: int = 3) -> ListSource:
    return ListSource([family_factors(LABELS, 40, 4, noise, seed=m) for m in range(slices)])


def compressed(
    source: ListSource,
    *,
    rank: int,
    clusters: int,
    dtype: torch.dtype = torch.float32,
    max_sweeps: int = 20,
    **options: Any,
) -> CollectionFit:
    recipe = SliceRecipe(rank=rank, cast=lambda basis: basis.to(dtype), max_sweeps=max_sweeps)
    return fit_collection(source, recipe, clusters=clusters, **options)


def sigma_of(fit: CollectionFit) -> Tensor:
    """[n, S, R, R]."""
    return torch.stack([fit.slice(m).sigma for m in range(fit.squared_norm.shape[1])], 1)


def dense_errors(source: ListSource, fit: CollectionFit) -> Tensor:
    """‖ΔW − UΣV‖_F² [n, S] of what the fit returned, all dense in fp64."""
    errors = torch.zeros(source.n, len(source.slice_names), dtype=torch.float64)
    for m in range(len(source.slice_names)):
        for i, factors in enumerate(source.factors(m)):
            k = int(fit.cluster[i])
            approximation = fit.slice(m).u[k].double() @ fit.slice(m).sigma[i].double() @ fit.slice(m).v[k].double()
            w = torch.zeros_like(approximation) if factors is None else dense(factors)
            errors[i, m] = (w - approximation).square().sum()
    return errors


def relative(fit: CollectionFit) -> Tensor:
    """Σ of relative squared errors, absent ones counted as zero."""
    return (fit.squared_error / fit.squared_norm.clamp_min(1e-300)).sum()


def problems(source: ListSource) -> list[SliceProblem]:
    return [SliceProblem.from_factors(source.factors(m), name) for m, name in enumerate(source.slice_names)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clusters", [1, 3])
def test_norms_and_errors_are_those_of_the_values_returned(clusters: int, dtype: torch.dtype) -> None:
    source = ListSource([random_factors(7, 40, 30, [2, 5, 3, 3, 4, 2, 6], seed=m) for m in range(2)])
    fit = compressed(source, rank=6, clusters=clusters, dtype=dtype)
    assert fit.slice(0).u.shape == (clusters, 40, 6) and fit.slice(0).v.shape == (clusters, 6, 30)
    assert fit.slice(0).u.dtype == fit.slice(0).v.dtype == dtype
    assert sigma_of(fit).shape == (7, 2, 6, 6) and sigma_of(fit).dtype == torch.float32
    # fp64 sums on both sides; factors were given in fp32.
    torch.testing.assert_close(fit.squared_error, dense_errors(source, fit), rtol=1e-9, atol=1e-9)
    norms = torch.tensor([[float(dense(f).square().sum()) for f in source.factors(m)] for m in range(2)]).double()
    torch.testing.assert_close(fit.squared_norm, norms.T, rtol=1e-6, atol=0)


def test_the_objective_is_the_squared_relative_error_of_adapters_over_all_slices() -> None:
    source = families()
    fit = compressed(source, rank=4, clusters=2)
    over_slices = (fit.squared_error.sum(1) / fit.squared_norm.sum(1)).sum()
    # The objective is measured with fp32 bases before Σ is refitted on them.
    assert float(over_slices) * 3 == pytest.approx(fit.objective[-1], rel=1e-5)


def test_a_cast_to_bf16_costs_no_more_than_its_rounding() -> None:
    source = families()
    exact, cast = (compressed(source, rank=4, clusters=3, dtype=d) for d in (torch.float32, torch.bfloat16))
    # bf16 rounds each basis entry by at most 2⁻⁹ of itself; Σ is refitted, so errors add in squares.
    assert float(relative(cast) - relative(exact)) < 2 * 4.0**-9 * source.n * 3


def test_planted_families_of_unequal_size_are_found() -> None:
    cluster = compressed(families(), rank=4, clusters=3).cluster
    assert [len({int(cluster[i]) for i in range(10) if LABELS[i] == label}) for label in range(3)] == [1, 1, 1]
    assert len(set(cluster.tolist())) == 3


def test_many_adapters_are_grouped_at_a_rank_that_tells_families_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_MANY", 8)
    monkeypatch.setattr(clustering, "_RANK_OF_MANY", 3)
    labels = [0] * 5 + [1] * 3 + [2] * 4
    source = ListSource([family_factors(labels, 24, 3, 0.02, seed=m) for m in range(3)])
    searched = []

    def recorded(probes: Any, n: int, rank: int, *rest: Any, **options: Any) -> Tensor:
        searched.append(rank)
        return torch.tensor(labels)

    monkeypatch.setattr(clustering, "best_assignment", recorded)
    fit = fit_collection(source, SliceRecipe(9), clusters=3)  # bases of rank 9 would hold all three families
    assert searched == [3] and fit.slice(0).u.shape[2] == 9
    assert all(len(fit.cluster[torch.tensor(labels) == label].unique()) == 1 for label in range(3))


def test_families_are_found_even_when_norms_differ_a_thousandfold() -> None:
    slices = []
    for m in range(3):
        factors = family_factors(LABELS, 40, 4, 0.05, seed=m)
        slices.append([Factors(f.b * 10.0 ** (i % 4), f.a) for i, f in enumerate(factors)])
    cluster = compressed(ListSource(slices), rank=4, clusters=3).cluster
    assert len({(LABELS[i], int(cluster[i])) for i in range(10)}) == 3


@pytest.mark.parametrize("clusters", [2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_objective_never_rises(clusters: int, seed: int) -> None:
    source = ListSource([random_factors(12, 40, 30, 4, seed=m) for m in range(2)])
    objective = compressed(source, rank=3, clusters=clusters, seed=seed).objective
    assert all(after <= before for before, after in pairwise(objective))


@pytest.mark.parametrize("rank", [2, 4])
def test_from_bad_labels_the_alternation_only_improves(rank: int) -> None:
    slices = problems(families(noise=0.3))
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 2, 2])
    state = alternate(slices, labels, 3, rank=rank, max_rounds=10, max_sweeps=20, report=silent)
    assert len(state.objective) > 1
    assert all(after <= before for before, after in pairwise(state.objective))


def test_adapters_in_the_wrong_family_move_to_the_right_one() -> None:
    slices = problems(families())
    labels = torch.tensor(LABELS)
    labels[9] = 1  # a member of family 0 among three of family 1
    state = alternate(slices, labels, 3, rank=4, max_rounds=10, max_sweeps=20, report=silent)
    assert state.cluster.tolist() == LABELS


def test_one_cluster_for_each_adapter_is_the_svd_of_each() -> None:  # §7.10
    source = ListSource([random_factors(5, 30, 20, 6, seed=m) for m in range(2)])
    fit = compressed(source, rank=3, clusters=5)
    tails = [[float(torch.linalg.svdvals(dense(f))[3:].square().sum()) for f in source.factors(m)] for m in range(2)]
    assert len(set(fit.cluster.tolist())) == 5
    torch.testing.assert_close(fit.squared_error, torch.tensor(tails).double().T, rtol=1e-5, atol=0)  # fp32 bases


def test_splitting_a_cluster_is_never_worse() -> None:  # §7.10
    slices = problems(ListSource([random_factors(8, 30, 20, 4, seed=m) for m in range(2)]))
    together = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    split = torch.tensor([0, 0, 2, 2, 1, 1, 1, 1])
    options = {"rank": 3, "max_rounds": 10, "max_sweeps": 20, "report": silent}
    two = alternate(slices, together, 2, **options)  # type: ignore[arg-type]
    three = alternate(slices, split, 3, **options)  # type: ignore[arg-type]
    assert three.objective[-1] <= two.objective[-1]


def fitted(labels: Sequence[int], clusters: int, slices: list[SliceProblem], rank: int) -> Clustering:
    return refit(slices, Clustering.unfitted(torch.tensor(labels), clusters), rank, 20, silent)


def test_an_empty_cluster_takes_the_worst_fitted_adapter() -> None:
    state = fitted([0, 1, 1, 0, 1, 1, 0, 1, 0, 0], 3, problems(families()), 4)  # families 1 and 2 share cluster 1
    error = state.weight - state.captured_by_own(state.cluster)
    moved = reassign(state)
    assert moved.cluster.bincount().min() > 0
    assert moved.cluster[int(error.argmax())] == 2
    assert moved.changed == [1, 2]


def test_an_empty_cluster_stays_empty_when_nobody_would_gain() -> None:
    (one,) = random_factors(1, 30, 20, 3)
    fit = compressed(ListSource([[one] * 4]), rank=3, clusters=3)
    assert float(relative(fit)) < 1e-10  # fp32 bases and Σ
    assert all(not fit.slice(0).u[k].any() for k in range(3) if k not in fit.cluster.tolist())


def test_an_adapter_that_fits_already_is_not_moved_into_an_empty_cluster() -> None:
    (one,) = random_factors(1, 30, 20, 3)
    state = fitted([0, 0, 0, 0], 3, problems(ListSource([[one] * 4])), 3)
    assert reassign(state).cluster.tolist() == [0, 0, 0, 0]


def test_an_empty_cluster_does_not_take_a_lonely_adapter() -> None:
    draw = torch.Generator().manual_seed(0)
    hard = Factors(torch.randn(30, 8, generator=draw), torch.randn(8, 20, generator=draw))
    easy = random_factors(2, 30, 20, 2)
    state = fitted([0, 1, 1], 3, problems(ListSource([[hard, *easy]])), 3)
    assert int((state.weight - state.captured_by_own(state.cluster)).argmax()) == 0
    assert reassign(state).cluster[0] == 0
    assert sorted(reassign(state).cluster.bincount().tolist()) == [1, 1, 1]


def test_a_refit_starts_from_the_bases_it_has() -> None:
    factors = random_factors(6, 40, 30, 4, seed=1)  # the HOSVD start leads to a local optimum 20 % lower here
    draws = [torch.Generator().manual_seed(seed) for seed in range(12)]
    matrices = unit([dense(f) for f in factors])
    tries = [hooi(matrices, 1, 60, torch.randn(30, 1, generator=draw).double()) for draw in draws]
    u, v, best = max(tries, key=lambda tried: tried[2])
    empty = Clustering.unfitted(torch.zeros(6, dtype=torch.int64), 1)
    state = replace(empty, u=[u[None].float()], v=[v.T[None].float()])
    again = refit(problems(ListSource([factors])), state, 1, 20, silent)
    assert 6 - again.objective[-1] >= best - 1e-5  # fp32 bases


@pytest.mark.parametrize("worse_at", [1, 2])
def test_a_refit_that_raises_the_objective_is_dropped(worse_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = alternation.refit, []

    def spoiled(slices: list[SliceProblem], state: Clustering, *rest: object) -> Clustering:
        calls.append(state)
        after = real(slices, state, *rest)  # type: ignore[arg-type]
        if len(calls) <= worse_at:
            return after
        return replace(after, objective=[*after.objective[:-1], after.objective[0] + 1])

    monkeypatch.setattr(alternation, "refit", spoiled)
    labels = torch.tensor(LABELS)
    labels[9] = 1  # wrong, so that something moves after the first refit
    state = alternate(problems(families()), labels, 3, rank=4, max_rounds=10, max_sweeps=20, report=silent)
    assert len(state.objective) == worse_at and state.cluster.tolist() == calls[worse_at - 1].cluster.tolist()


@pytest.mark.parametrize("clusters", [1, 3])
def test_the_same_seed_gives_the_same_bits(clusters: int) -> None:
    a, b = (compressed(families(noise=0.5), rank=3, clusters=clusters, seed=4) for _ in range(2))
    assert torch.equal(a.cluster, b.cluster) and torch.equal(sigma_of(a), sigma_of(b)) and a.objective == b.objective
    for m in range(3):
        assert torch.equal(a.slice(m).u, b.slice(m).u) and torch.equal(a.slice(m).v, b.slice(m).v)


def test_the_fit_of_one_cluster_does_not_depend_on_the_order_of_adapters() -> None:
    factors = random_factors(6, 40, 30, 4)
    order = [3, 1, 5, 0, 2, 4]
    a = compressed(ListSource([factors]), rank=5, clusters=1)
    b = compressed(ListSource([[factors[i] for i in order]]), rank=5, clusters=1)
    # Returned in fp32; entries of Σ are of the size of the norm, here up to 20.
    torch.testing.assert_close(sigma_of(a)[order], sigma_of(b), rtol=0, atol=1e-4)
    torch.testing.assert_close(a.slice(0).u, b.slice(0).u, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clusters", [1, 2])
def test_missing_slices_and_zero_adapters_have_zero_scalings_and_do_not_touch_the_others(clusters: int) -> None:
    first, second = (random_factors(5, 40, 30, 4, seed=m) for m in range(2))
    zero = Factors(torch.zeros(40, 4), second[0].a)
    source = ListSource([[*first, None, zero], [None, *second[1:], second[0], zero]])
    fit = compressed(source, rank=5, clusters=clusters)
    for adapter, at in ((5, 0), (6, 0), (0, 1), (6, 1)):
        assert not sigma_of(fit)[adapter, at].any()
        assert fit.squared_norm[adapter, at] == 0 and fit.squared_error[adapter, at] == 0
    torch.testing.assert_close(fit.squared_error, dense_errors(source, fit), rtol=1e-9, atol=1e-9)  # fp64 sums
    if clusters == 1:
        alone = compressed(ListSource([first, [None, *second[1:]]]), rank=5, clusters=1)
        assert torch.equal(alone.slice(0).u, fit.slice(0).u) and torch.equal(
            sigma_of(alone)[:, 0], sigma_of(fit)[:5, 0]
        )


def test_a_slice_that_a_whole_cluster_lacks_has_zero_bases_there() -> None:
    near = family_factors([0, 0, 0, 1, 1, 1], 40, 4, 0.05)
    partial: list[Factors | None] = [*near[:3], None, None, None]
    fit = compressed(ListSource([near, near, partial]), rank=4, clusters=2)
    lacking = int(fit.cluster[3])
    assert set(fit.cluster[3:].tolist()) == {lacking} and lacking not in fit.cluster[:3].tolist()
    assert not fit.slice(2).u[lacking].any() and not fit.slice(2).v[lacking].any()


def test_an_adapter_of_zeros_alone_is_returned_as_zeros() -> None:
    fit = compressed(ListSource([[Factors(torch.zeros(12, 2), torch.zeros(2, 10))]]), rank=3, clusters=1)
    assert not sigma_of(fit).any() and not fit.slice(0).u.any() and fit.objective == [0.0]


def test_a_rank_beyond_every_dimension_is_padded() -> None:
    source = ListSource([random_factors(4, 6, 5, 3)])
    fit = compressed(source, rank=16, clusters=2)
    assert fit.slice(0).u.shape == (2, 6, 16) and sigma_of(fit).shape == (4, 1, 16, 16)
    assert float(relative(fit)) < 1e-10  # fp32 bases and Σ
    assert not fit.slice(0).u[:, :, 6:].any() and not sigma_of(fit)[:, :, :, 5:].any()


WEIGHED = 3
"""Slices that are read once more at the start, for the adapters' energies: all of three."""


def test_one_cluster_reads_every_slice_once_and_does_no_clustering() -> None:
    source, stages = families(), []
    fit = compressed(source, rank=4, clusters=1, progress=lambda *event: stages.append(event))
    assert source.reads == WEIGHED + 3 and fit.passes == 1 and len(fit.objective) == 1
    assert stages == [("fit", m, 3) for m in (1, 2, 3)]


def test_progress_counts_up_to_its_total_in_every_stage() -> None:
    stages: list[tuple[str, int, int]] = []
    compressed(families(), rank=4, clusters=3, progress=lambda *event: stages.append(event))
    assert [stage for stage in dict.fromkeys(event[0] for event in stages)] == ["start", "fit"]
    assert all(1 <= done <= total for _, done, total in stages) and stages[-1] == ("fit", 3, 3)


def begun(labels: Sequence[int]) -> MemoryStore:
    """A store whose first pass has these labels, as if the search on the probes had found them."""
    store = MemoryStore()
    store.begin(0, torch.tensor(labels))
    return store


WRONG = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]  # the last of family 0 among three of family 1


def test_further_passes_move_adapters_and_lower_the_objective() -> None:
    stages: list[tuple[str, int, int]] = []
    fit = compressed(families(), rank=4, clusters=3, store=begun(WRONG), progress=lambda *event: stages.append(event))
    assert fit.cluster.tolist() == LABELS and fit.passes == 2
    assert fit.objective[1] < fit.objective[0]
    assert [stage for stage in dict.fromkeys(event[0] for event in stages)] == ["fit", "refit 1"]
    torch.testing.assert_close(fit.squared_error, dense_errors(families(), fit), rtol=1e-9, atol=1e-9)  # fp64 sums
    straight = compressed(families(), rank=4, clusters=3, store=begun(LABELS))
    assert abs(float(relative(fit) / relative(straight)) - 1) < 1e-3  # another start of the same iteration


def test_a_further_pass_leaves_clusters_that_nobody_joined_or_left_to_the_bit() -> None:
    one, two = (compressed(families(), rank=4, clusters=3, store=begun(WRONG), max_passes=n) for n in (1, 2))
    for m in range(3):
        before, after = one.slice(m), two.slice(m)
        assert torch.equal(before.u[2], after.u[2]) and torch.equal(before.v[2], after.v[2])
        assert torch.equal(before.sigma[[2, 5]], after.sigma[[2, 5]])
        assert not torch.equal(before.u[0], after.u[0])


def test_as_many_passes_as_allowed_and_no_more() -> None:
    fit = compressed(families(), rank=4, clusters=3, store=begun(WRONG), max_passes=1)
    assert fit.passes == 1 and fit.cluster.tolist() == WRONG


def test_a_pass_that_does_not_lower_the_objective_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = passes.fit_slice

    def spoiled(*args: Any, **options: Any) -> SliceFit:
        fit = real(*args, **options)
        return replace(fit, squared_error=fit.squared_norm) if options["before"] else fit

    monkeypatch.setattr(passes, "fit_slice", spoiled)
    fit = compressed(families(), rank=4, clusters=3, store=begun(WRONG))
    assert fit.passes == 2 and len(fit.objective) == 1 and fit.cluster.tolist() == WRONG
    torch.testing.assert_close(fit.squared_error, dense_errors(families(), fit), rtol=1e-9, atol=1e-9)  # fp64 sums


class Killed(Exception):
    pass


class DyingStore(MemoryStore):
    """Ends the fit when it has saved so many slices."""

    def __init__(self, slices: int):
        super().__init__()
        self.left = slices

    def save(self, number: int, index: int, fit: SliceFit) -> None:
        super().save(number, index, fit)
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_fit_goes_on_where_it_stopped_to_the_same_bits(after: int) -> None:
    store = DyingStore(after)
    store.begin(0, torch.tensor(WRONG))
    with pytest.raises(Killed):
        compressed(families(), rank=4, clusters=3, store=store)
    source = families()
    fit = compressed(source, rank=4, clusters=3, store=store)
    assert source.reads == WEIGHED + 6 - after  # two passes over three slices
    whole = compressed(families(), rank=4, clusters=3, store=begun(WRONG))
    assert fit.objective == whole.objective and torch.equal(fit.squared_error, whole.squared_error)
    for m in range(3):
        assert torch.equal(fit.slice(m).u, whole.slice(m).u) and torch.equal(fit.slice(m).sigma, whole.slice(m).sigma)


@pytest.mark.parametrize("labels", [[0] * 12, [0, 1, 2] * 4])
def test_the_number_of_threads_changes_errors_by_rounding_only(labels: list[int]) -> None:
    source = ListSource([random_factors(12, 300, 200, 8)])
    before, errors = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fit = compressed(source, rank=12, clusters=max(labels) + 1, store=begun(labels), max_passes=1)
            errors.append((fit.squared_error.sum(1) / fit.squared_norm.sum(1)).sqrt())
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)  # bases are fp32


class OneSliceAtATime(ListSource):
    """Refuses to give a slice while factors of another one, or their stacks, are still alive."""

    def __init__(self, slices: list[list[Factors | None]]):
        super().__init__(slices)
        self.given: list[weakref.ref[Tensor]] = []

    def factors(self, slice_index: int) -> list[Factors | None]:
        gc.collect()
        assert not [alive for alive in self.given if alive() is not None]
        fresh = [f and Factors(f.b.clone(), f.a.clone()) for f in super().factors(slice_index)]
        self.given = [weakref.ref(x) for f in fresh if f for x in (f.b, f.a)]
        return fresh


def test_factors_of_one_slice_at_a_time_are_in_memory() -> None:
    source = OneSliceAtATime([family_factors(LABELS, 40, 4, 0.05, seed=m) for m in range(3)])
    fit = compressed(source, rank=4, clusters=3, store=begun(WRONG))
    assert fit.passes == 2 and source.reads == WEIGHED + 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "clusters": 1}, "rank 0"),
        ({"rank": 4, "clusters": 11}, "11 clusters for 10 adapters: give between 1 and 10"),
        ({"rank": 4, "clusters": 0}, "0 clusters"),
        ({"rank": 4, "clusters": 2, "max_passes": 0}, "max_passes 0"),
        ({"rank": 4, "clusters": 2, "max_sweeps": 0}, "max_sweeps 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(JDLoRAError, match=message):
        compressed(families(), **options)  # type: ignore[arg-type]


def test_a_source_without_adapters_or_slices_is_refused() -> None:
    for source in (ListSource([[]]), families(slices=1)):
        source.slice_names = source.slice_names if source.n == 0 else []
        with pytest.raises(JDLoRAError, match="nothing to compress"):
            compressed(source, rank=4, clusters=1)


def test_a_source_that_gives_too_few_factors_is_refused() -> None:
    source = families()
    source.n = 11
    with pytest.raises(JDLoRAError, match=r"slice\d: factors of 10 adapters, expected 11"):
        compressed(source, rank=4, clusters=1)
