"""Figures of the scale benchmark: ratios within a round, tails of cold beside warm, and the goals as stated."""

import pytest
from process_tree import Memory
from scale_report import (
    DISK,
    PAGE_CACHE,
    Listing,
    Served,
    StartUps,
    Traffic,
    goals_of,
    interval_of_p99,
    percentiles,
    ratio_of_p99,
)


def served(adapters=100_000, own=(98, 49, 100), reference=(100, 50, 100), cold=1.0, disk=1.0):
    return Served(
        adapters=adapters,
        own=Traffic(list(own), [0.1], [10.0]),
        reference=Traffic(list(reference), [0.1], [10.0]),
        cold={
            where: {"cold": [0.1] * 99 + [0.2 * factor], "warm": [0.1] * 99 + [0.2]}
            for where, factor in ((PAGE_CACHE, cold), (DISK, disk))
        },
        listing=Listing([0.2, 0.1, 0.3], adapters, 10),
        memory={"APIServer": Memory(5, 4, 2, 1, 1), "EngineCore": Memory(9, 8, 5, 2, 1)},
        statistics={"known": adapters},
        metrics_lines=100,
        log_lines=50,
    )


def test_a_ratio_is_of_the_same_round():
    # The machine halves its speed in the second round.
    assert served().ratio == pytest.approx(0.98)


def test_the_goals_are_those_of_the_project():
    seconds = {None: [20, 30, 25], 10_000: [22.9, 32.9, 40], 100_000: [36, 46, 41]}
    starts = {adapters: StartUps(found, found) for adapters, found in seconds.items()}
    found = {goal.text: goal for goal in goals_of([served(100, own=(1,), reference=(1,)), served(cold=1.0)], starts)}
    assert [goal.met for goal in found.values()] == [True, True, True, True, False]
    assert [round(goal.figure, 3) for goal in found.values()] == [0.98, 1.0, 1.0, 2.9, 16.0]
    assert not goals_of([served(own=(96,), reference=(100,))], {})[0].met
    # Slower in the tail by a quarter, with Σ on the disk alone.
    met = [goal.met for goal in goals_of([served(disk=30)], {})]
    assert met == [True, True, False]


def test_what_was_not_measured_has_no_goal():
    assert goals_of([served(1000)], {None: StartUps([1], [1]), 1000: StartUps([2], [2])}) == []


def test_processor_seconds_are_compared_within_a_round_too():
    more = StartUps([10, 20], [5, 9]).beyond(StartUps([9, 18], [4, 6]))
    assert more == (1.5, 2)


def test_tails_and_their_uncertainty():
    same = {"cold": [0.1] * 100, "warm": [0.1] * 100}
    assert ratio_of_p99(same) == 1 and interval_of_p99(same) == (1, 1)
    slow = {"cold": [0.1] * 90 + [0.3] * 10, "warm": [0.1] * 100}
    assert ratio_of_p99(slow) == pytest.approx(3) and interval_of_p99(slow)[0] > 1
    assert percentiles([], 3) == {"count": 0}
    assert percentiles([1, 2, 3], 3) == {"count": 3, "p50": 2, "p90": 2.8, "p99": 2.98}


def test_a_record_is_json_with_percentiles_and_not_every_request():
    record = served().as_json()
    assert record["beside_reference"]["own"]["tokens_per_second"] == [98, 49, 100]
    assert record["models"] == {"seconds": 0.2, "models": 100_000, "bytes": 10}
    assert record["memory_bytes"]["EngineCore"]["anonymous"] == 5
    assert record["cold"][DISK]["cold"]["count"] == 100
