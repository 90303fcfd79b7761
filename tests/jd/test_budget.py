"""Budgets: bytes are exact, and choices are the best of what was measured."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.jd.conftest import RANKS
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.budget import (
    Choice,
    Sizes,
    best_of,
    choices,
    choose_for_bytes,
    choose_for_error,
    frontier,
)
from vllm_jdlora.jd.error_curves import ErrorCurves
from vllm_jdlora.jd.paper_preset import paper_preset
from vllm_jdlora.jd.problem import Factors, SliceProblem


def sizes_of(curves: ErrorCurves, slices: int = 2) -> Sizes:
    return Sizes(((24, 24),) * slices, (8 * slices * 3 * 48,) * curves.n)


def planted(relative: list[list[list[float]]], clusters: tuple[int, ...], ranks: tuple[int, ...]) -> ErrorCurves:
    """Curves with the given relative errors [C, G, n] in one slice of unit norms."""
    squared = torch.tensor(relative, dtype=torch.float64).square()[..., None]
    n = squared.shape[2]
    labels = torch.zeros(len(clusters), n, dtype=torch.int64)
    return ErrorCurves(clusters, ranks, labels, squared, torch.ones(n, 1, dtype=torch.float64))


def test_bytes_are_those_of_the_tensors() -> None:
    sizes = Sizes(((6, 4), (2, 4)), (100, 200, 300), basis_width=1, sigma_width=2, always_plain=7)
    k, r, kept = 2, 3, 2
    tensors = [torch.zeros(k, d_out, r, dtype=torch.int8) for d_out, _ in sizes.slices]
    tensors += [torch.zeros(k, r, d_in, dtype=torch.int8) for _, d_in in sizes.slices]
    tensors += [torch.zeros(kept, 2, r, r, dtype=torch.bfloat16)]
    assert sizes.total(k, r, [1]) == sum(t.numel() * t.element_size() for t in tensors) + 200 + 7
    assert sizes.uncompressed == 607
    diagonal = Sizes(sizes.slices, sizes.plain, basis_width=1, scale_width=4, diagonal=True)
    scales = torch.zeros(k, 2, 2, r, dtype=torch.float32)  # for each cluster, slice, side and direction
    assert diagonal.bases(k, r) == sizes.bases(k, r) + scales.numel() * 4
    assert diagonal.scaling(r) == torch.zeros(2, r, dtype=torch.bfloat16).nbytes


def test_no_more_clusters_are_chosen_than_adapters_are_compressed() -> None:
    errors = [[[0.5, 0.5, 0.5, 0.5]], [[0.1, 0.9, 0.9, 0.9]]]
    curves = planted(errors, (1, 2), (4,))
    sizes = Sizes(((64, 64),), (10**6,) * 4)
    assert [c.clusters for c in choices(curves, sizes, 0.2)] == []
    assert [c.clusters for c in choices(curves, sizes, 0.6)] == [1]


def test_a_byte_budget_gets_the_least_error_that_fits(measured: ErrorCurves) -> None:
    sizes = sizes_of(measured)
    relative = measured.relative_squared()
    for share in (0.1, 0.2, 0.5):
        most = int(share * sizes.uncompressed)
        options = [
            float(relative[row, column].mean())
            for (row, k), (column, rank) in itertools.product(enumerate((1, 2, 3)), enumerate(RANKS))
            if sizes.total(k, rank) <= most
        ]
        found = choose_for_bytes(measured, sizes, most)
        assert found.bytes == sizes.total(found.clusters, found.rank) <= most
        assert found.mean_squared_error == pytest.approx(min(options)) and not found.plain
    with pytest.raises(JDLoRAError, match=rf"rank 1, 1 clusters\) takes {sizes.total(1, 1)}"):
        choose_for_bytes(measured, sizes, 10)


def test_an_error_budget_gets_the_fewest_bytes_that_keep_it(measured: ErrorCurves) -> None:
    sizes = sizes_of(measured)
    errors = measured.relative_squared().sqrt()
    for most in (0.3, 0.5, 0.8):
        found = choose_for_error(measured, sizes, most, margin=0)
        totals = []
        for (row, k), (column, rank) in itertools.product(enumerate((1, 2, 3)), enumerate(RANKS)):
            plain = [i for i in range(8) if float(errors[row, column, i]) > most]
            if len(plain) < 8:
                totals.append(sizes.total(k, rank, plain))
        assert found.bytes == min(totals) and found.max_error <= most
    stricter = choose_for_error(measured, sizes, 0.5, margin=0.5)
    assert stricter.max_error <= 0.5 / 1.5 and stricter.bytes >= choose_for_error(measured, sizes, 0.5).bytes


def test_keeping_one_hard_adapter_plain_wins_over_a_rank_for_all() -> None:
    easy, hard = [[0.1] * 9 + [0.9]], [[0.05] * 9 + [0.3]]
    curves = planted([easy + hard], (1,), (4, 16))
    sizes = Sizes(((64, 64),), (2 * 16 * 128,) * 10)
    found = choose_for_error(curves, sizes, 0.35, margin=0)
    assert (found.rank, found.plain) == (4, (9,)) and found.bytes == sizes.total(1, 4, [9])
    # With a plain adapter as dear as everything else it is the other way round.
    found = choose_for_error(curves, Sizes(sizes.slices, (*sizes.plain[:9], 100_000)), 0.35, margin=0)
    assert (found.rank, found.plain) == (16, ())


def test_an_error_that_only_plain_adapters_keep_says_what_can_be_reached() -> None:
    curves = planted([[[0.5] * 4]], (1,), (4,))
    with pytest.raises(JDLoRAError, match=r"0\.500 can be reached"):
        choose_for_error(curves, Sizes(((64, 64),), (4096,) * 4), 0.2)


def test_the_frontier_has_no_choice_that_another_beats(measured: ErrorCurves) -> None:
    sizes = sizes_of(measured)
    best = frontier(measured, sizes)
    for one in choices(measured, sizes):
        assert any(b.bytes <= one.bytes and b.mean_squared_error <= one.mean_squared_error for b in best)
    assert all(a.bytes < b.bytes and a.mean_squared_error > b.mean_squared_error for a, b in itertools.pairwise(best))


def test_a_rank_between_two_of_the_grid_is_used_where_it_fits() -> None:
    curves = planted([[[0.5] * 4, [0.4] * 4]], (1,), (4, 8))
    sizes = Sizes(((64, 64),), (4096,) * 4)
    found = choose_for_bytes(curves, sizes, sizes.total(1, 6) + 10)
    assert (found.rank, found.bytes) == (6, sizes.total(1, 6))
    assert choose_for_bytes(curves, sizes, sizes.total(1, 8)).rank == 8


def test_of_choices_as_good_the_lowest_rank_is_taken() -> None:
    def choice(rank: int, squared: float) -> Choice:
        return Choice(rank, 1, 100, squared**0.5, squared**0.5, squared)

    assert best_of([choice(32, 0.100), choice(16, 0.104), choice(8, 0.2)]).rank == 16
    assert best_of([choice(32, 0.100), choice(16, 0.106)]).rank == 32


def test_the_papers_choice_takes_the_least_clusters_under_its_error() -> None:
    assert [(paper_preset([], n).rank, paper_preset([], n).clusters) for n in (1, 32, 64, 100)] == [
        (16, 1), (24, 1), (40, 1), (64, 1)]  # fmt: skip
    # Adapters of rank 2 in 4 families of 16 dimensions: one basis holds a quarter of them, two a half, four all.
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q.split(16, 1) for _ in range(2))
    factors = [
        Factors(left[i % 4] @ torch.randn(16, 2, generator=draw), torch.randn(2, 16, generator=draw) @ right[i % 4].T)
        for i in range(104)
    ]
    middle = SliceProblem.from_factors(factors, "s")
    found = paper_preset([middle, middle, middle], 104)
    assert (found.rank, found.clusters) == (16, 2)
    assert found.squared_error is not None and 0.3 < found.squared_error < 0.6
