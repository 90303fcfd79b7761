"""On vLLM's own scheduler: a batch never holds more than there are slots for, order is kept, no wait is endless."""

import math
import random
from collections import Counter

import pytest

pytest.importorskip("vllm")

from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.request import RequestStatus

from loadtests.lone_scheduler import (
    compressed_adapter,
    finish_step,
    lone_scheduler,
    new_request,
    plain_adapter,
    run_step,
    slot_options,
)
from vllm_jdlora.serving.cluster_order import ClusterQueue
from vllm_jdlora.serving.lane_queue import LaneQueue
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scheduler import JDScheduler

LONGEST = 8
"""Tokens of an answer, so steps that a request runs."""


@pytest.fixture
def make(tmp_path):
    """A scheduler with these slots that keeps first come, first served, and no promise."""
    plain = {"age_cap": math.inf, "cluster_order": False}
    return lambda slots, **settings: lone_scheduler(tmp_path, slot_options(**{**plain, **slots}), **settings)


class WalksAll(JDScheduler):
    """Limits alone, on vLLM's own queue: it looks at each waiting request in each step, in order."""

    def _make_lanes(self):
        pass


def held(scheduler):
    """Adapters and clusters of the running requests."""
    paths = {r.lora_request.lora_path for r in scheduler.running if r.lora_request}
    parsed = {path: AdapterPath.parse(path) for path in paths}
    compressed = [p for p in parsed.values() if p is not None]
    return {
        "plain_slots": len(parsed) - len(compressed),
        "scaling_slots": len(compressed),
        "base_slots": len({p.cluster for p in compressed}),
    }


def random_adapter(draw):
    kind = draw.random()
    if kind < 0.1:
        return None
    if kind < 0.4:
        return plain_adapter(draw.randrange(6))
    adapter = int(40 * draw.random() ** 2)
    return compressed_adapter(adapter, cluster=adapter % 9)


def random_request(draw, **settings):
    return new_request(random_adapter(draw), prompt=draw.randrange(1, 40), answer=draw.randint(1, LONGEST), **settings)


def names(requests):
    return [request.request_id for request in requests]


@pytest.mark.parametrize("order", ["fcfs", "clusters", "priority"])
@pytest.mark.parametrize("age_cap", [0.0, math.inf])
@pytest.mark.parametrize("kv_blocks", [1000, 12], ids=["", "preempting"])
def test_no_batch_holds_more_than_its_slots_and_every_request_ends(make, order, age_cap, kv_blocks):
    slots = {"scaling_slots": 5, "plain_slots": 2, "base_slots": 3}
    settings = {**slots, "age_cap": age_cap, "cluster_order": order != "fcfs"}
    policy = "priority" if order == "priority" else "fcfs"
    scheduler = make(settings, policy=policy, max_num_seqs=16, kv_blocks=kv_blocks)
    draw, most, requests = random.Random(0), Counter(), []
    while len(requests) < 300 or scheduler.has_unfinished_requests():
        for _ in range(draw.randrange(4) if len(requests) < 300 else 0):
            requests.append(random_request(draw, priority=draw.randrange(3)))
            scheduler.add_request(requests[-1])
        if draw.random() < 0.1 and requests:
            scheduler.finish_requests(draw.choice(requests).request_id, RequestStatus.FINISHED_ABORTED)
        run_step(scheduler)
        for kind, number in held(scheduler).items():
            assert number <= slots[kind]
            most[kind] = max(most[kind], number)
    assert most == slots, "the limits were met, not missed by far"
    assert isinstance(scheduler.waiting, ClusterQueue) == (order == "clusters")
    assert all(request.is_finished() for request in requests)
    assert kv_blocks == 1000 or any(request.num_preemptions for request in requests)


@pytest.mark.parametrize("slots", [{"scaling_slots": 5}, {"plain_slots": 2}, {"base_slots": 3, "scaling_slots": 6}])
def test_lanes_admit_what_a_walk_over_all_waiting_requests_admits_in_the_same_order(make, slots):
    ours, walk = make(slots, max_num_seqs=12), make(slots, max_num_seqs=12, make=WalksAll)
    draw = random.Random(1)
    for step in range(300):
        for _ in range(draw.randrange(4) if step < 200 else 0):
            request = random_request(draw)
            for scheduler in (ours, walk):
                copy = new_request(request.lora_request, prompt=request.num_prompt_tokens, answer=request.max_tokens)
                copy.request_id = request.request_id
                scheduler.add_request(copy)
        if draw.random() < 0.2 and ours.requests:
            gone = draw.choice(sorted(ours.requests))
            for scheduler in (ours, walk):
                scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
        a, b = ours.schedule(), walk.schedule()
        assert list(a.num_scheduled_tokens.items()) == list(b.num_scheduled_tokens.items())
        assert names(ours.running) == names(walk.running)
        assert names(ours.waiting) == names(walk.waiting)
        assert len(ours.waiting) == len(walk.waiting)
        finish_step(ours, a)
        finish_step(walk, b)
    assert isinstance(ours.waiting, LaneQueue) and not isinstance(walk.waiting, LaneQueue)
    assert not ours.has_unfinished_requests()


def test_vllms_own_queue_stays_while_every_adapter_asked_for_has_a_slot(make):
    scheduler = make({"scaling_slots": 3, "plain_slots": 1, "base_slots": 2}, max_num_seqs=8)
    for adapter in (0, 1, 2, 0, 1, 2):
        scheduler.add_request(new_request(compressed_adapter(adapter, cluster=adapter % 2)))
    scheduler.add_request(new_request(plain_adapter(0)))
    run_step(scheduler)
    assert type(scheduler.waiting) is FCFSRequestQueue
    scheduler.add_request(new_request(plain_adapter(1)))
    assert type(scheduler.waiting) is LaneQueue


def test_as_many_slots_as_requests_can_run_never_limit_them(make):
    scheduler = make({"scaling_slots": 8, "plain_slots": 8, "base_slots": 8}, max_num_seqs=8)
    for adapter in range(30):
        scheduler.add_request(new_request(compressed_adapter(adapter, cluster=adapter)))
        scheduler.add_request(new_request(plain_adapter(adapter)))
    run_step(scheduler)
    assert type(scheduler.waiting) is FCFSRequestQueue and len(scheduler.running) == 8


def test_revisions_that_are_served_at_once_share_their_bases(make):
    scheduler = make({"base_slots": 1})
    for cluster, revision in ((0, "r"), (1, "r"), (0, "s")):
        scheduler.add_request(new_request(compressed_adapter(0, cluster, revision=revision)))
    run_step(scheduler)
    assert [r.lora_request.lora_path[:8] for r in scheduler.running] == ["jd://r:0", "jd://s:0"]


KINDS = {
    "plain_slots": plain_adapter,
    "scaling_slots": lambda n: compressed_adapter(n, cluster=0),
    "base_slots": lambda n: compressed_adapter(n, cluster=n),
}


def steps_waited(scheduler, waiting, stream, limit=500):
    """Steps until each of `waiting` runs while `stream` adds requests in every one of them."""
    for request in waiting:
        scheduler.add_request(request)
    waited = {}
    for step in range(limit):
        for request in stream():
            scheduler.add_request(request)
        run_step(scheduler)
        waited.update({r.request_id: step for r in waiting if r.num_computed_tokens and r.request_id not in waited})
        if len(waited) == len(waiting):
            break
    return [waited.get(request.request_id, limit) for request in waiting]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("kind", KINDS)
class TestOneThatWaitsForASlot:
    def test_would_wait_for_ever_while_those_that_hold_it_are_asked_for_again(self, make, kind, policy):
        scheduler, adapter = make({kind: 2}, policy=policy), KINDS[kind]
        stream = lambda: [new_request(adapter(n), answer=LONGEST) for n in (0, 1)]  # noqa: E731
        for request in stream():
            scheduler.add_request(request)
        assert steps_waited(scheduler, [new_request(adapter(2))], stream) == [500]

    def test_gets_it_when_those_that_run_have_ended(self, make, kind, policy):
        scheduler, adapter = make({kind: 2, "age_cap": 0.0}, policy=policy), KINDS[kind]
        stream = lambda: [new_request(adapter(n), answer=LONGEST) for n in (0, 1)]  # noqa: E731
        for request in stream():
            scheduler.add_request(request)
        (waited,) = steps_waited(scheduler, [new_request(adapter(2))], stream)
        assert waited <= LONGEST + 1

    def test_waits_no_longer_than_those_before_it_need(self, make, kind, policy):
        scheduler, adapter = make({kind: 1, "age_cap": 0.0}, policy=policy), KINDS[kind]
        scheduler.add_request(new_request(adapter(0), answer=LONGEST))
        run_step(scheduler)
        many = [new_request(adapter(1 + n), answer=LONGEST) for n in range(6)]
        waited = steps_waited(scheduler, many, lambda: [new_request(adapter(0), answer=LONGEST)])
        assert all(steps <= (place + 1) * (LONGEST + 1) for place, steps in enumerate(waited))
        assert waited == sorted(waited)

    def test_has_one_slot_drained_for_it_while_the_others_serve_on(self, make, kind, policy):
        scheduler, adapter = make({kind: 4, "age_cap": 0.0}, policy=policy), KINDS[kind]
        stream = lambda: [new_request(adapter(n), answer=LONGEST) for n in range(4)]  # noqa: E731
        for request in stream():
            scheduler.add_request(request)
        run_step(scheduler)
        scheduler.add_request(new_request(adapter(4)))
        run_step(scheduler)
        before = Counter(r.lora_request.lora_int_id for r in scheduler.running)
        for request in stream():
            scheduler.add_request(request)
        run_step(scheduler)
        after = Counter(r.lora_request.lora_int_id for r in scheduler.running)
        assert sum((after - before).values()) == 3 and len(scheduler.waiting) == 2


def test_the_age_cap_is_counted_from_arrival(make):
    now = 100.0
    on_clock = type("OnClock", (JDScheduler,), {"clock": staticmethod(lambda: now)})
    scheduler = make({"plain_slots": 1, "age_cap": 5.0}, make=on_clock)
    scheduler.add_request(new_request(plain_adapter(0), answer=LONGEST))
    run_step(scheduler)
    waits = new_request(plain_adapter(1))
    scheduler.add_request(waits)
    for now in (100.0, 104.9):  # noqa: B007
        scheduler.add_request(new_request(plain_adapter(0), answer=LONGEST))
        run_step(scheduler)
    assert len(scheduler.running) == 3
    now = 105.4
    scheduler.add_request(new_request(plain_adapter(0), answer=LONGEST))
    run_step(scheduler)
    assert len(scheduler.running) == 3, "the fourth is younger than one that waits too long"


def test_a_reservation_ends_with_the_request_that_has_it(make):
    scheduler = make({"plain_slots": 1, "age_cap": 0.0})
    scheduler.add_request(new_request(plain_adapter(0), answer=LONGEST))
    run_step(scheduler)
    waits = new_request(plain_adapter(1))
    scheduler.add_request(waits)
    run_step(scheduler)
    younger = new_request(plain_adapter(0))
    scheduler.add_request(younger)
    run_step(scheduler)
    assert younger not in scheduler.running
    scheduler.finish_requests(waits.request_id, RequestStatus.FINISHED_ABORTED)
    run_step(scheduler)
    assert younger in scheduler.running


class Counts(JDScheduler):
    looks = 0

    def _handle_blocked_waiting_request(self, request):
        self.looks += 1
        return super()._handle_blocked_waiting_request(request)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_look_at_each_of_those_that_wait(make, kind):
    scheduler = make({kind: 4, "age_cap": 0.0}, make=Counts)
    for n in range(2000):
        scheduler.add_request(new_request(KINDS[kind](n % 500)))
    for _ in range(20):
        admitted, scheduler.looks = len(scheduler.running), 0
        output = run_step(scheduler)
        assert scheduler.looks <= len(output.scheduled_new_reqs) + 1, admitted


def test_requests_that_wait_for_a_slot_are_reported_as_deferred(make):
    scheduler = make({"plain_slots": 1}, max_num_seqs=4)
    for n in (0, 1, 2, 1):
        scheduler.add_request(new_request(plain_adapter(n)))
    run_step(scheduler)
    stats = scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (1, 0, 3)
    for _ in range(100):
        run_step(scheduler)
    stats = scheduler.make_stats()
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (0, 0, 0)


def test_a_request_that_waits_for_something_else_too_does_not_hold_up_its_lane(make):
    scheduler = make({"plain_slots": 1})
    for n in (0, 1):
        scheduler.add_request(new_request(plain_adapter(n)))
    run_step(scheduler)
    stalled, ready = new_request(plain_adapter(0)), new_request(plain_adapter(0))
    stalled.status = RequestStatus.WAITING_FOR_STREAMING_REQ
    for request in (stalled, ready):
        scheduler.add_request(request)
    run_step(scheduler)
    assert ready in scheduler.running and stalled not in scheduler.running
    assert names(scheduler.waiting)[1] == stalled.request_id


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_what_requests_wait_for_is_told(make, policy):
    scheduler = make({"plain_slots": 1, "base_slots": 2, "scaling_slots": 3}, policy=policy, max_num_seqs=8)
    for n in (0, 1, 1):
        scheduler.add_request(new_request(plain_adapter(n)))
    for n in (0, 1, 2, 3, 4, 5):
        scheduler.add_request(new_request(compressed_adapter(n, cluster=n)))
    run_step(scheduler)
    assert scheduler.waiting_by_reason() == {"plain_slot": 2, "base_slot": 4, "other": 0}
    for n in (0, 6):
        scheduler.add_request(new_request(compressed_adapter(n, cluster=0)))
    for _ in range(2):
        run_step(scheduler)
    assert scheduler.waiting_by_reason() == {"plain_slot": 2, "scaling_slot": 4, "other": 0}
