"""Where base slots are scarce, a step touches few clusters, and no request is passed by others for ever."""

import itertools
import math

import pytest

pytest.importorskip("vllm")

from loadtests.lone_scheduler import compressed_adapter, lone_scheduler, new_request, run_step, slot_options
from vllm_jdlora.serving.cluster_order import OLDEST_SHARE, ClusterQueue
from vllm_jdlora.serving.lane_queue import LaneQueue
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scheduler import JDScheduler

LONGEST = 8


@pytest.fixture
def make(tmp_path):
    """A scheduler on a clock that goes on by a second with each look at it."""
    clock = itertools.count()
    ticking = type("Ticking", (JDScheduler,), {"clock": staticmethod(lambda: float(next(clock)))})

    def make(slots, **settings):
        options = slot_options(**{"age_cap": math.inf, **slots})
        return lone_scheduler(tmp_path, options, make=ticking, **settings)

    return make


def ask(scheduler, *clusters, answer=LONGEST):
    """One request for each; each for another adapter than the last of that cluster."""
    for cluster in clusters:
        scheduler.add_request(new_request(compressed_adapter(len(scheduler.requests), cluster), answer=answer))


def clusters(requests):
    return [AdapterPath.parse(request.lora_request.lora_path).cluster for request in requests]


@pytest.mark.parametrize(("waiting", "first"), [([0, 1, 2, 2, 2], 2), ([2, 1, 0, 0], 2), ([2, 1, 0, 0, 0], 0)])
def test_a_free_base_slot_goes_to_the_cluster_whose_requests_have_waited_most_in_all(make, waiting, first):
    scheduler = make({"base_slots": 1})
    ask(scheduler, *waiting)
    run_step(scheduler)
    assert set(clusters(scheduler.running)) == {first}


def test_a_cluster_whose_bases_are_still_there_goes_before_one_that_is_waited_for_longer(make):
    scheduler = make({"base_slots": 2})
    ask(scheduler, 0, 1, answer=2)
    ask(scheduler, 2)
    for _ in range(2):
        run_step(scheduler)
    assert not scheduler.running and clusters(scheduler.waiting) == [2]
    ask(scheduler, 3, 3, 0)
    run_step(scheduler)
    assert set(clusters(scheduler.running)) == {0, 2}


def test_requests_of_running_clusters_go_first_where_few_more_can_run(make):
    scheduler = make({"base_slots": 2}, max_num_seqs=3)
    ask(scheduler, 0, 0)
    run_step(scheduler)
    ask(scheduler, 1, 2, 0)
    run_step(scheduler)
    assert clusters(scheduler.running) == [0, 0, 0] and clusters(scheduler.waiting) == [1, 2]


@pytest.mark.parametrize("age_cap", [math.inf, 0.0])
def test_one_that_waits_too_long_is_not_passed_for_ever_while_slots_are_free(make, age_cap):
    scheduler = make({"base_slots": 2, "age_cap": age_cap}, max_num_seqs=4)
    ask(scheduler, 0, 0, 0, 0, 2, 3)
    run_step(scheduler)
    steps = 0
    while 2 in clusters(scheduler.waiting) and steps < 200:
        ask(scheduler, 0, 0)
        run_step(scheduler)
        steps += 1
    assert (steps < OLDEST_SHARE * LONGEST) == (age_cap == 0.0)


def test_first_come_first_served_is_kept_if_asked_for_or_while_all_bases_fit(make):
    kept, fits, off = make({"base_slots": 1, "cluster_order": False}), make({"base_slots": 2}), make({"base_slots": 1})
    for scheduler in (kept, fits, off):
        ask(scheduler, 0, 1, 1, 1)
        run_step(scheduler)
    assert type(kept.waiting) is LaneQueue and clusters(kept.running) == [0]
    assert not isinstance(fits.waiting, LaneQueue) and clusters(fits.running) == [0, 1, 1, 1]
    assert type(off.waiting) is ClusterQueue and clusters(off.running) == [1, 1, 1]
