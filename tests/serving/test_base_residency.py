"""Bases of clusters come for a step over those that were used longest ago."""

import numpy as np
import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.base_residency import ResidentBases

BYTES = 10


def made(capacity: int, clusters: int):
    lies = {}
    bases = ResidentBases(capacity, lambda slot, cluster: lies.__setitem__(slot, cluster) or BYTES)
    bases.load(clusters)
    return bases, lies


def test_with_a_slot_for_each_cluster_a_cluster_is_its_slot():
    bases, lies = made(4, 3)
    clusters = np.array([2, -1, 0])
    assert bases.slots(clusters).tolist() == [2, -1, 0]
    assert lies == {0: 0, 1: 1, 2: 2}
    assert (bases.swaps, bases.bytes, len(bases)) == (3, 3 * BYTES, 3)


def test_a_step_gets_its_clusters_and_nothing_of_it_is_evicted():
    bases, lies = made(2, 5)
    rng = np.random.default_rng(0)
    for _ in range(200):
        step = rng.choice(5, rng.integers(1, 3), replace=False)
        clusters = rng.choice([*step, -1], 8)
        slots = bases.slots(clusters)
        assert [lies.get(slot, -1) for slot in slots.tolist()] == clusters.tolist()


def test_the_cluster_that_was_used_longest_ago_goes():
    bases, lies = made(2, 5)
    bases.slots(np.array([1]))
    bases.touch(bases.slots(np.array([0])))
    bases.slots(np.array([3]))
    assert sorted(lies.values()) == [0, 3]


def test_a_step_with_too_many_clusters_moves_nothing():
    bases, lies = made(2, 5)
    before = dict(lies)
    with pytest.raises(JDLoRAError, match="3 clusters and there are 2 base slots"):
        bases.slots(np.array([2, 3, 4]))
    assert lies == before


def test_another_collection_starts_from_the_first_slot():
    bases, lies = made(2, 5)
    bases.slots(np.array([4, 3]))
    bases.load(2)
    assert lies == {0: 0, 1: 1}
    assert bases.slots(np.array([1, 0])).tolist() == [1, 0]
    bases.load(3)
    assert not bases.all_resident and len(bases) == 2


def test_a_base_that_cannot_be_written_is_not_taken_for_resident():
    bases, lies = made(1, 3)
    bases._write = lambda slot, cluster: 1 / 0
    with pytest.raises(ZeroDivisionError):
        bases.slots(np.array([2]))
    bases._write = lambda slot, cluster: lies.__setitem__(slot, cluster) or BYTES
    assert [lies[slot] for slot in bases.slots(np.array([2])).tolist()] == [2]


def test_bases_of_other_collections_come_and_go_beside_those_that_stay():
    bases, lies = made(7, 3)
    served = range(3)
    for clusters in (4, 2, 3, 4, 1, 3, 3):
        before = bases.slots(np.array(served)).tolist()
        numbers = bases.numbers_beside(clusters)
        bases.load_beside(numbers)
        assert bases.clusters == len(numbers) == clusters and bases.all_resident
        assert bases.slots(np.array(served)).tolist() == before, "bases that are used have moved"
        assert [lies[slot] for slot in bases.slots(np.array([*served, *numbers])).tolist()] == [*served, *numbers]
        bases.drop(served)
        served = numbers
        assert max(numbers) < 14, "numbers grow with what came and went"
    assert len(bases) == 3


def test_bases_for_which_no_slots_are_free_change_nothing():
    bases, lies = made(5, 3)
    before = dict(lies)
    with pytest.raises(JDLoRAError, match=r"3 clusters do not fit beside the 3 .* 5 base slots"):
        bases.numbers_beside(3)
    numbers = bases.numbers_beside(2)
    bases._write = lambda slot, base: 1 / 0
    with pytest.raises(ZeroDivisionError):
        bases.load_beside(numbers)
    assert lies == before and len(bases) == bases.clusters == 3
    assert bases.slots(np.array([2, 0])).tolist() == [2, 0]
