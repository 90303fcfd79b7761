"""Choices within a byte budget: as good as measuring everything, whatever was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.jd.conftest import FAMILIES, SLICES
from tests.jd.dense import ListSource, dense, family_factors, random_factors
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd import byte_choice, error_curves, measured_slices, search
from vllm_jdlora.jd.budget import Choice, Sizes
from vllm_jdlora.jd.byte_choice import Candidate, candidates, cheapest_loss, compared
from vllm_jdlora.jd.clustering import fit_collection, weighted_slices
from vllm_jdlora.jd.diag import fit_diag
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.slice_fit import SliceRecipe


def test_errors_of_jd_diag_are_those_of_fits_of_every_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [SliceProblem.from_factors(factors, "s") for factors in SLICES]
    sizes = Sizes(((24, 24),) * 2, (8 * 2 * 3 * 48,) * 8, diagonal=True)
    labels = {1: torch.zeros(8, dtype=torch.int64), 2: torch.tensor(FAMILIES)}
    tried = [c for c in candidates({"diag": sizes}, int(0.4 * sizes.uncompressed)) if c.clusters == 1]
    tried.append(Candidate("diag", 7, 2, sizes.total(2, 7)))
    monkeypatch.setattr(byte_choice, "_HOPELESS", float("inf"))
    found = compared(problems, 8, tried, labels)
    assert [choice.clusters for choice in found] == [1, 2]
    for choice in found:
        rank, k = choice.rank, choice.clusters
        lost, norm = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
        for factors in SLICES:
            for label in range(k):
                members = [i for i in range(8) if int(labels[k][i]) == label]
                part = SliceProblem.from_factors([factors[i] for i in members], "s")
                fit = fit_diag(part, rank, max_sweeps=40)
                for sigma, position in zip(fit.sigma, part.members.tolist(), strict=True):
                    w = dense(factors[members[position]])
                    lost[members[position]] += (w - fit.u @ sigma.diag() @ fit.v).square().sum()
                    norm[members[position]] += w.square().sum()
        assert choice.mean_squared_error == pytest.approx(float((lost / norm).mean()), rel=1e-3)


def test_both_methods_are_compared_at_the_bytes_of_each() -> None:
    # Strangers: truncated SVDs side by side are the best there is, and only JD-Diag holds them without R² numbers each.
    source = ListSource([random_factors(16, 40, 40, 4, seed=m) for m in range(2)])
    slices = weighted_slices(source, None, 0)
    sizes = Sizes(((40, 40),) * 2, (2 * 2 * 4 * 80,) * 16)
    both = {"full": sizes, "diag": replace(sizes, diagonal=True)}
    found = cheapest_loss(slices, both, int(0.5 * sizes.uncompressed))
    alone = cheapest_loss(slices, {"full": sizes}, int(0.5 * sizes.uncompressed))
    assert (found.method, alone.method) == ("diag", "full")
    assert found.mean_squared_error < alone.mean_squared_error and found.bytes <= 0.5 * sizes.uncompressed
    with pytest.raises(JDLoRAError, match="too few for 16 adapters"):
        cheapest_loss(slices, {"diag": both["diag"]}, 10)


def test_candidates_fill_the_bytes_and_none_is_sure_to_be_beaten() -> None:
    full = Sizes(((64, 64),) * 4, (2 * 4 * 8 * 128,) * 200)
    sizes = {"full": full, "diag": replace(full, diagonal=True)}
    budget = full.uncompressed // 4
    found = candidates(sizes, budget)
    for c in found:
        size = sizes[c.method]
        assert c.bytes == size.total(c.clusters, c.rank) <= budget
        assert c.rank == 64 or size.total(c.clusters, c.rank + 1) > budget
    for method in sizes:
        of_it = [c for c in found if c.method == method]
        assert len([c for c in of_it if c.rank == 64]) <= 1
        assert [c.clusters for c in of_it] == sorted(c.clusters for c in of_it) and len(of_it) > 2
    assert min(c.rank for c in found if c.method == "full") >= 4
    with pytest.raises(JDLoRAError, match=r"rank 2, 1 clusters\) takes"):
        candidates(sizes, 100)


def test_a_budget_that_holds_everything_takes_no_more_rank_than_that() -> None:
    source = ListSource([random_factors(4, 40, 40, 3, seed=m) for m in range(2)])
    found = cheapest_loss(weighted_slices(source, None, 0), {"full": Sizes(((40, 40),) * 2, (10**6,) * 4)}, 4 * 10**6)
    assert found.mean_squared_error < 1e-9 and found.rank <= 12


def measured_error(source: ListSource, method: str, rank: int, clusters: int) -> float:
    """What the collection itself loses: mean squared relative error of its own fit."""
    fit = fit_collection(source, SliceRecipe(rank, method), clusters=clusters, effort=0, max_passes=2)
    return float((fit.squared_error.sum(1) / fit.squared_norm.sum(1)).mean())


def six_families() -> ListSource:
    """36 adapters in 6 families of 4 directions, three projections of two layers; one family is hard."""
    labels = [i % 6 for i in range(36)]
    slices = []
    for m in range(6):
        plain, noisy = (family_factors(labels, 32, 4, noise, seed=m) for noise in (0.1, 0.4))
        slices.append([noisy[i] if labels[i] == 0 else plain[i] for i in range(36)])
    source = ListSource(slices)
    source.slice_names = [f"layers.{m // 3}.{'qkv'[m % 3]}_proj" for m in range(6)]
    return source


def test_a_choice_from_a_few_clusters_is_as_good_as_measuring_all(monkeypatch: pytest.MonkeyPatch) -> None:
    source = six_families()
    full = Sizes(((32, 32),) * 6, (2 * 6 * 4 * 64,) * 36)
    sizes = {"full": full, "diag": replace(full, diagonal=True)}
    budget = int(0.3 * full.uncompressed)
    monkeypatch.setattr(measured_slices, "_MEMBERS", 12)  # two or three of six slices for each adapter
    monkeypatch.setattr(error_curves, "_CLUSTERS", (1, 2, 3, 4, 6, 12))
    monkeypatch.setattr(search, "_FEW", 4)  # starts are compared roughly
    fits = counted(monkeypatch)
    found = cheapest_loss(weighted_slices(source, None, 0), sizes, budget)
    assert fits["clusters"] < 0.5 * 6 * sum(c.clusters for c in candidates(sizes, budget))
    errors = {c: measured_error(source, c.method, c.rank, c.clusters) for c in candidates(sizes, budget)}
    chosen = errors[next(c for c in errors if (c.method, c.clusters) == (found.method, found.clusters))]
    assert chosen <= 1.05 * min(errors.values())  # of choices that differ by 5 % the lowest rank may be taken
    assert max(errors.values()) > 1.5 * min(errors.values())  # there was something to choose
    assert found.mean_squared_error == pytest.approx(chosen, rel=0.15)  # few slices, groups that are not searched


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many clusters were fitted."""
    count = {"clusters": 0}
    methods: Mapping[str, byte_choice._Method] = byte_choice._METHODS

    def counting(method: byte_choice._Method) -> byte_choice._Method:
        def lost(problem: SliceProblem, ranks: list[int]) -> Tensor:
            count["clusters"] += 1
            return method.lost(problem, ranks)

        return replace(method, lost=lost)

    monkeypatch.setattr(byte_choice, "_METHODS", {name: counting(method) for name, method in methods.items()})
    return count


def test_a_hopeless_candidate_is_not_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    source = six_families()
    slices = weighted_slices(source, None, 0)
    measured = measured_slices.measured_slices(slices)
    families, mixed = (torch.tensor([each(i) for i in range(36)]) for each in (lambda i: i % 6, lambda i: i // 6))
    fits = counted(monkeypatch)
    tried = [Candidate("full", 4, 5, 0), Candidate("full", 4, 6, 0)]
    found: list[Choice] = compared(measured, 36, tried, {5: mixed, 6: families})
    assert [choice.clusters for choice in found] == [6]
    assert fits["clusters"] == 6 * 6 + 6 * 3  # after one slice of each projection
