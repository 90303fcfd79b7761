"""The search for an assignment: planted families found from bad labels, every step a gain, the same every time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.jd.dense import dense, family_factors, hooi, random_factors, unit
from vllm_jdlora.jd import search
from vllm_jdlora.jd.alternation import alternate
from vllm_jdlora.jd.cores import Cores
from vllm_jdlora.jd.exchange import Evaluator, exchanged, groups_of, improve_by_exchange, improve_in_bulk, labels_of
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.search import best_assignment, single_member_clusters
from vllm_jdlora.jd.start import similarity_of


def silent(stage: str, done: int, total: int) -> None:
    pass


def nothing() -> None:
    pass


def problems(slices: list[list[Factors]]) -> list[SliceProblem]:
    return [SliceProblem.from_factors(factors, f"slice{m}") for m, factors in enumerate(slices)]


def families(labels: list[int], noise: float = 0.3, slices: int = 2, rank: int = 4) -> list[list[Factors]]:
    return [family_factors(labels, 40, rank, noise, seed=m) for m in range(slices)]


def pairs(labels: Tensor) -> Tensor:
    """Who is with whom [n, n]: the same for any naming of the clusters."""
    return labels[:, None] == labels


def lost(slices: list[list[Factors]], labels: Tensor, rank: int) -> float:
    """Summed relative squared error of joint fits of the clusters, all dense."""
    total = 0.0
    for factors in slices:
        for k in labels.unique():
            members = unit([dense(f) for f, label in zip(factors, labels, strict=True) if label == k])
            total += len(members) - hooi(members, rank, 30)[2]
    return total


def evaluator(slices: list[list[Factors]], rank: int, budget: float = 1e9) -> Evaluator:
    return Evaluator(Cores(problems(slices), len(slices[0]), ignored=0.04), rank, budget)


@pytest.mark.parametrize("ranks", [5, [2, 5, 3, 3, 4, 2, 6]])
@pytest.mark.parametrize("members", [[0, 1, 2, 3, 4, 5, 6], [1, 4, 6], [2]])
def test_a_set_captures_what_a_dense_joint_fit_of_it_captures(ranks: int | list[int], members: list[int]) -> None:
    slices = [random_factors(7, 40, 30, ranks, seed=m) for m in range(2)]
    found = evaluator(slices, 4).energies([tuple(members)])[0]
    reference = sum(hooi(unit([dense(factors[i]) for i in members]), 4)[2] for factors in slices)
    # Directions with up to 4 % of the energy are ignored and only two sweeps made: 1.5 % here at most.
    assert reference * 0.94 <= found <= reference + 1e-6


def test_leading_directions_that_are_all_kept_reproduce_each_adapter() -> None:
    factors = random_factors(5, 40, 30, [2, 5, 3, 3, 4])
    cores = Cores(problems([factors]), 5, ignored=0.0)
    for i, w in enumerate(unit([dense(f) for f in factors])):
        found = cores.left[0][i].T @ cores.right[0][i]
        torch.testing.assert_close(found, w, rtol=0, atol=1e-6)  # factors are fp32


@pytest.mark.parametrize("kept", [0, 2**30])
def test_bases_measure_other_adapters_and_their_own_alike(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_jdlora.jd.cores._KEPT_GRAM", kept)
    monkeypatch.setattr("vllm_jdlora.jd.cores._LARGEST_CORE", 8)  # three members fit into a core, more do not
    slices = [random_factors(9, 40, 30, 2, seed=m) for m in range(2)]
    cores = Cores(problems(slices), 9, ignored=0.0)
    for members in (torch.tensor([0, 3, 7]), torch.arange(7)):
        bases = cores.bases(members, 3)
        torch.testing.assert_close(cores.captured_by(bases, members), bases.captured, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cores.captured(members[None], 3)[0], bases.captured, rtol=1e-9, atol=1e-9)
        other = sum(
            float((u.double().T @ unit([dense(factors[8])])[0] @ v.double()).square().sum())
            for factors, u, v in zip(slices, bases.u, bases.v, strict=True)
        )
        assert abs(float(cores.captured_by(bases, torch.tensor([8]))[0]) - other) < 1e-6  # factors are fp32


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_families_are_found_from_random_labels(seed: int) -> None:
    planted = torch.arange(18) % 3
    slices = families(planted.tolist())
    judge = evaluator(slices, 4)
    shuffled = planted[torch.randperm(18, generator=torch.Generator().manual_seed(seed))]
    similarity = similarity_of(problems(slices), 18)
    found = improve_by_exchange(judge, groups_of(shuffled, 3), similarity, judge.budget, nothing)
    assert torch.equal(pairs(labels_of(found, 18)), pairs(planted))


def test_many_moves_at_a_time_repair_many_wrong_labels() -> None:
    planted = torch.arange(60) % 3
    slices = families(planted.tolist())
    judge = evaluator(slices, 4)
    wrong = planted.clone()
    wrong[torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]] += 1
    found = improve_in_bulk(judge, groups_of(wrong % 3, 3), torch.ones(60, 60), judge.budget, nothing)
    assert torch.equal(pairs(labels_of(found, 60)), pairs(planted))
    assert len(judge.steps) <= 3  # not one by one


@pytest.mark.parametrize("improve", [improve_by_exchange, improve_in_bulk])
def test_every_accepted_step_lowers_the_error(improve: object) -> None:
    slices = [random_factors(16, 40, 30, 4, seed=m) for m in range(2)]
    judge = evaluator(slices, 3)
    groups = groups_of(torch.arange(16) % 4, 4)
    before = judge.total(groups)
    similarity = similarity_of(problems(slices), 16)
    found = improve(judge, groups, similarity, judge.budget, nothing)  # type: ignore[operator]
    assert all(after > before for before, after in pairwise([before, *judge.steps]))
    assert sorted(i for group in found for i in group) == list(range(16))
    if improve is improve_by_exchange:
        assert len(judge.steps) > 1
        # The steps are those of the slices themselves, up to what the leading directions leave out.
        assert lost(slices, labels_of(found, 16), 3) < lost(slices, torch.arange(16) % 4, 3)


def test_nothing_is_gained_by_a_further_move_or_swap() -> None:
    slices = [random_factors(9, 40, 30, 4, seed=m) for m in range(2)]
    judge = evaluator(slices, 3)
    similarity = similarity_of(problems(slices), 9)
    groups = improve_by_exchange(judge, groups_of(torch.arange(9) % 3, 3), similarity, judge.budget, nothing)
    total, own = judge.total(groups), labels_of(groups, 9)
    for i in range(9):
        for k in range(3):
            moved = own.clone()
            moved[i] = k
            assert judge.total(groups_of(moved, 3)) <= total + judge.least
        for j in range(i):
            swapped = own.clone()
            swapped[i], swapped[j] = own[j], own[i]
            assert judge.total(groups_of(swapped, 3)) <= total + judge.least


def test_an_assignment_at_which_the_alternation_stops_at_once_is_improved() -> None:
    planted, cut = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    slices = families(planted.tolist(), noise=0.05)
    options = {"rank": 4, "max_rounds": 10, "max_sweeps": 20, "report": silent}
    stuck = alternate(problems(slices), cut, 2, **options).cluster  # type: ignore[arg-type]
    assert torch.equal(stuck, cut)
    judge = evaluator(slices, 4)
    groups = improve_by_exchange(judge, groups_of(stuck, 2), torch.ones(6, 6), judge.budget, nothing)
    found = labels_of(groups, 6)
    assert torch.equal(pairs(found), pairs(planted))
    assert lost(slices, found, 4) < 0.3 * lost(slices, stuck, 4)


def test_families_are_told_apart_by_faint_directions_where_all_else_is_common(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = torch.tensor([0, 1] * 4)
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(30, 10, generator=draw)).Q for _ in range(2))
    factors = []
    for label in planted.tolist():
        own = torch.arange(2 + 4 * label, 6 + 4 * label)  # four directions with 2 % of the energy
        b = torch.cat([left[:, :2] @ torch.randn(2, 2, generator=draw), 0.1 * left[:, own]], 1)
        factors.append(Factors(b, torch.cat([right[:, :2], right[:, own]], 1).T))
    monkeypatch.setattr(search, "candidate_starts", lambda *_: [torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])])
    found = best_assignment(problems([factors]), 8, 6, 2, 0, silent, effort=0.1)
    assert torch.equal(pairs(found), pairs(planted))


def test_an_empty_cluster_takes_adapters() -> None:
    slices = families([0, 1, 2] * 3, noise=0.1)
    judge = evaluator(slices, 4)
    groups = groups_of(torch.tensor([0, 1, 1] * 3), 3)
    found = improve_by_exchange(judge, groups, similarity_of(problems(slices), 9), judge.budget, nothing)
    assert torch.equal(pairs(labels_of(found, 9)), pairs(torch.tensor([0, 1, 2] * 3)))


@pytest.mark.parametrize("effort", [0.0, 0.05])
def test_the_best_assignment_is_never_worse_than_its_starts(effort: float) -> None:
    slices = [random_factors(12, 40, 30, 4, seed=m) for m in range(2)]
    best = best_assignment(problems(slices), 12, 3, 3, 0, silent, effort=effort)
    starts = search.candidate_starts(search.similarities(problems(slices), 12, 3), 12, 3, 0)
    least = min(lost(slices, start, 3) for start in starts)
    if effort:
        assert lost(slices, best, 3) < 0.999 * least
    else:  # told apart by their leading directions after two sweeps; the reference iterates to the end
        assert lost(slices, best, 3) <= 1.01 * least


def test_a_search_that_its_leading_directions_misled_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = families([0, 1] * 4, noise=0.05)
    start, worse = torch.tensor([0, 1] * 4), torch.tensor([0, 0, 1, 1] * 2)
    monkeypatch.setattr(search, "candidate_starts", lambda *_: [start])
    monkeypatch.setattr(search, "_search", lambda *_: groups_of(worse, 2))
    assert torch.equal(best_assignment(problems(slices), 8, 4, 2, 0, silent), start)


def test_the_same_seed_gives_the_same_labels() -> None:
    probes = problems([random_factors(14, 40, 30, 4, seed=m) for m in range(2)])
    found = [best_assignment(probes, 14, 3, 4, 7, silent, effort=0.05) for _ in range(2)]
    assert torch.equal(found[0], found[1])


def test_the_same_seed_gives_the_same_labels_on_any_number_of_threads() -> None:
    probes = problems([random_factors(9, 40, 30, 3)])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(best_assignment(probes, 9, 3, 3, 7, silent, effort=0.02))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


def test_adapters_absent_from_some_probes_or_all_get_a_label() -> None:
    first, second = (random_factors(8, 40, 30, 3, seed=m) for m in range(2))
    probes = [
        SliceProblem.from_factors([*first[:7], None], "a"),
        SliceProblem.from_factors([None, *second[1:7], None], "b"),
    ]
    labels = best_assignment(probes, 8, 3, 3, 0, silent, effort=0.05)
    assert labels.shape == (8,) and labels.dtype == torch.int64 and 0 <= int(labels.min()) <= int(labels.max()) < 3


@pytest.mark.parametrize(("n", "clusters", "expected"), [(4, 1, [0, 0, 0, 0]), (4, 4, [0, 1, 2, 3])])
def test_one_cluster_and_a_cluster_for_each_need_no_search(n: int, clusters: int, expected: list[int]) -> None:
    probes = problems([random_factors(n, 40, 30, 3)])
    assert best_assignment(probes, n, 3, clusters, 0, silent).tolist() == expected


def test_progress_counts_up_to_a_hundred() -> None:
    events: list[tuple[str, int, int]] = []
    probes = problems([random_factors(12, 40, 30, 4)])
    best_assignment(probes, 12, 3, 3, 0, lambda *event: events.append(event), effort=0.05)
    done = [event[1] for event in events]
    assert {event[0::2] for event in events} == {("start", 100)} and done == sorted(done) and done[-1] == 100


def test_clusters_with_one_member_are_named() -> None:
    assert single_member_clusters(torch.tensor([0, 2, 2, 3, 0, 5]), 6) == [3, 5]


def test_a_group_exchanges_members() -> None:
    assert exchanged((1, 4, 6), (4,), (0, 9)) == (0, 1, 6, 9)
