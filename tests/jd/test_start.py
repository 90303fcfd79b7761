"""Starts of the clusters: families are seen through small similarities, and balance is on offer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.jd.dense import family_factors, random_factors
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.start import (
    balanced_groups,
    candidate_starts,
    related_groups,
    similarities,
    similarity_of,
)


def faint_families(labels: Tensor, within: float, noise: float) -> Tensor:
    """Similarities [n, n] with unit diagonal, `within` inside a family, symmetric noise everywhere."""
    n = len(labels)
    wobble = noise * torch.randn(n, n, generator=torch.Generator().manual_seed(1)).triu(1)
    return (within * (labels[:, None] == labels) + wobble + wobble.T).fill_diagonal_(1)


def pairs(labels: Tensor) -> Tensor:
    """Who is with whom [n, n]: the same for any naming of the groups."""
    return labels[:, None] == labels


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_related_groups_find_unequal_families_through_similarities_far_below_one(seed: int) -> None:
    labels = torch.tensor([0] * 30 + [1] * 12 + [2] * 8)
    # Inside a group of eight an adapter's own 1 would count for 0.125, six times what a family shares.
    found = related_groups(faint_families(labels, 0.02, 0.002), 3, torch.Generator().manual_seed(seed))
    assert torch.equal(pairs(found), pairs(labels))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_balanced_groups_find_equal_families(seed: int) -> None:
    labels = torch.arange(40) % 4
    found = balanced_groups(faint_families(labels, 0.02, 0.002), 4, torch.Generator().manual_seed(seed))
    assert torch.equal(pairs(found), pairs(labels))


@pytest.mark.parametrize(("n", "clusters"), [(10, 3), (7, 7), (5, 1)])
def test_balanced_groups_differ_by_one_at_most(n: int, clusters: int) -> None:
    similarity = faint_families(torch.zeros(n, dtype=torch.int64), 0.0, 0.3)
    sizes = balanced_groups(similarity, clusters, torch.Generator().manual_seed(0)).bincount(minlength=clusters)
    assert int(sizes.max()) - int(sizes.min()) <= 1


def test_balanced_groups_cannot_be_bettered_by_a_swap() -> None:
    similarity = faint_families(torch.zeros(12, dtype=torch.int64), 0.0, 0.3).fill_diagonal_(0)
    labels = balanced_groups(similarity, 3, torch.Generator().manual_seed(0))

    def inside(candidate: Tensor) -> float:
        return float((similarity * pairs(candidate)).sum())

    for i in range(12):
        for j in range(i):
            swapped = labels.clone()
            swapped[i], swapped[j] = labels[j], labels[i]
            assert inside(swapped) <= inside(labels) + 1e-4  # fp32 sums of a hundred terms


def test_similarities_do_not_depend_on_norms_in_any_slice() -> None:
    slices = [random_factors(5, 40, 30, 4, seed=m) for m in range(2)]
    louder = [[Factors(f.b * 2.0 ** (i * (7 * m - 3)), f.a) for i, f in enumerate(fs)] for m, fs in enumerate(slices)]
    plain, scaled = (
        similarities([SliceProblem.from_factors(factors, "s") for factors in each], 5, 4) for each in (slices, louder)
    )
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # fp32


def test_a_family_of_mixed_signs_is_similar_in_squared_cosines() -> None:
    labels = torch.tensor([0, 1] * 4)
    probes = [SliceProblem.from_factors(family_factors(labels.tolist(), 40, 3, 0.0, seed=m), "s") for m in range(6)]
    similarity = similarities(probes, 8, 3)[1].fill_diagonal_(0)
    same = pairs(labels).fill_diagonal_(False)
    assert float(similarity[same].mean()) > 5 * float(similarity[~pairs(labels)].mean())


def test_related_and_balanced_groups_are_both_on_offer() -> None:
    labels = [0] * 7 + [1] * 3 + [2] * 2
    probes = [SliceProblem.from_factors(family_factors(labels, 40, 3, 0.02, seed=m), "s") for m in range(3)]
    starts = candidate_starts(similarities(probes, 12, 3), 12, 3, seed=0)
    assert any(torch.equal(pairs(start), pairs(torch.tensor(labels))) for start in starts)
    assert any(start.bincount(minlength=3).tolist() == [4, 4, 4] for start in starts)


def test_another_seed_draws_other_starts() -> None:
    probes = [SliceProblem.from_factors(random_factors(12, 40, 30, 4), "s")]
    a, b = (candidate_starts(similarities(probes, 12, 3), 12, 3, seed) for seed in (0, 100))
    assert any(not torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_similarity_of_adapters_with_nothing_is_zero() -> None:
    (one,) = random_factors(1, 40, 30, 3)
    similarity = similarity_of([SliceProblem.from_factors([one, None], "s")], 2)
    assert similarity.tolist() == [[1.0, 0.0], [0.0, 0.0]]
