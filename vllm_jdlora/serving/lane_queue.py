"""vLLM's waiting queue in lanes: requests that need the same slots stand in one, and a step looks at lanes only.

vLLM's own queue is walked from its head in each step, past every request that is blocked. Here those that wait for a
slot cost nothing until it comes free: where a kind of slot is full only lanes whose key holds one are looked at, else
a bounded number, the first of each compared.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from itertools import islice
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import RequestStatus

from vllm_jdlora.serving.admission import Admission, Slots, ticket_of

LOOK_AHEAD = 1024
"""Lanes that a step compares at most, of those whose key holds no slot."""
REVIEWS_PER_AGE_CAP = 16
"""How often lanes are looked through for requests that have waited too long."""

_Needs = tuple[tuple[Slots, Hashable], ...]


class Lane:
    """Waiting requests [oldest first] that need the same scarce slots.

    Attributes:
        arrived: sum of the times of their arrivals.
    """

    __slots__ = ("arrived", "needs", "requests")

    def __init__(self, needs: _Needs):
        self.needs = needs
        self.requests: deque[Any] = deque()
        self.arrived = 0.0

    @property
    def number(self) -> int:
        """Of the arrival of its first request."""
        return ticket_of(self.requests[0]).number


class _Group(dict[_Needs, Lane]):
    """Lanes that need slots of the same kinds, those served last at the end, and how many requests wait in them."""

    length = 0


class LaneQueue(RequestQueue):
    """First come, first served among the requests that may run now; a request that comes back keeps its place.

    It is true while a request may be admitted in this step, however many wait.
    """

    def __init__(self, admission: Admission, requests: Iterable[Any], deferred: set[Any]):
        """deferred: the scheduler's set of requests that something else than capacity keeps waiting (metrics)."""
        self._admission = admission
        self._deferred = deferred
        self._groups: dict[tuple[Slots, ...], _Group] = {}
        self._lanes_for: dict[tuple[Slots, Hashable], dict[_Needs, Lane]] = {}
        self._length = 0
        self._unseen: dict[Any, None] = {}
        self._next_review = 0.0
        self._ranked: list[tuple[Any, int, Lane]] | None = None
        self._chosen: Lane | None = None
        self._exhausted = False
        for request in requests:
            self.add_request(request)

    def begin_step(self) -> None:
        self._ranked, self._chosen, self._exhausted = None, None, False
        if self._admission.now >= self._next_review:
            self._next_review = self._admission.now + self._admission.age_cap / REVIEWS_PER_AGE_CAP
            self._review()

    def add_request(self, request: Any) -> None:
        needs = tuple(need for need in ticket_of(request).needs if need[0].scarce)
        group = self._groups.setdefault(tuple(slots for slots, _ in needs), _Group())
        lane = group.get(needs)
        if lane is None:
            lane = group[needs] = Lane(needs)
            for need in needs:
                self._lanes_for.setdefault(need, {})[needs] = lane
        number = ticket_of(request).number
        if not lane.requests or number > ticket_of(lane.requests[-1]).number:
            lane.requests.append(request)
        else:
            lane.requests.insert(bisect_left(lane.requests, number, key=lambda r: ticket_of(r).number), request)
        lane.arrived += ticket_of(request).since
        self._length += 1
        group.length += 1
        self._unseen[request] = None
        self._ranked = self._chosen = None

    def prepend_request(self, request: Any) -> None:
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.add_request(request)

    def peek_request(self) -> Any:
        if not self._length:
            raise IndexError("peek from an empty queue")
        if self._chosen is None:
            self._chosen = self._choose()
        if self._chosen is None:
            # vLLM asks before it knows that none may run: it turns this one away, and finds the queue false.
            self._exhausted = True
            self._chosen = next(lane for group in self._groups.values() for lane in group.values())
        return self._chosen.requests[0]

    def pop_request(self) -> Any:
        request = self.peek_request()
        lane = self._chosen
        assert lane is not None
        lane.requests.popleft()
        self._left(request, lane)
        if lane.requests:
            # The lane that was served last is the last to be looked at next.
            group = self._group(lane)
            group[lane.needs] = group.pop(lane.needs)
            if self._ranked is not None and not self._exhausted:
                heapq.heappush(self._ranked, self._rank(lane))
        self._chosen = None
        return request

    def remove_request(self, request: Any) -> None:
        lane = self._lane_of(request)
        if lane is None or request not in lane.requests:
            raise ValueError(f"request {request.request_id} does not wait here")
        self._remove(lane, {request})

    def remove_requests(self, requests: Iterable[Any]) -> None:
        by_lane: dict[Lane, set[Any]] = {}
        for request in requests:
            lane = self._lane_of(request)
            if lane is not None:
                by_lane.setdefault(lane, set()).add(request)
        for lane, gone in by_lane.items():
            self._remove(lane, gone)

    def __bool__(self) -> bool:
        if self._exhausted and self._unseen:
            self._deferred.update(self._unseen)
            self._unseen.clear()
        return self._length > 0 and not self._exhausted

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        waiting = (request for group in self._groups.values() for lane in group.values() for request in lane.requests)
        return iter(sorted(waiting, key=lambda request: ticket_of(request).number))

    def waiting_by_reason(self) -> dict[str, int]:
        """Requests that wait for a slot that is held by others, by the name of its kind; in O(running requests)."""
        waiting: dict[str, int] = {}
        for kinds, group in self._groups.items():
            full = next((slots for slots in kinds if slots.full), None)
            if full is not None:
                lanes = (lane for key in full.holders for lane in self._lanes_for.get((full, key), {}).values())
                waiting[full.name] = group.length - sum(len(lane.requests) for lane in lanes)
        return waiting

    def _choose(self) -> Lane | None:
        """The first lane whose first request may run. What is blocked now stays so: in a step no slot comes free."""
        if self._ranked is None:
            self._ranked = [self._rank(lane) for lane in self._eligible()]
            heapq.heapify(self._ranked)
        while self._ranked:
            _, number, lane = heapq.heappop(self._ranked)
            if lane.requests and lane.number == number and self._admission.admits(lane.requests[0]):
                return lane
        return None

    def _rank(self, lane: Lane) -> tuple[Any, int, Lane]:
        """Smaller goes first. The number is that of no other lane, so lanes are never compared."""
        return lane.number, lane.number, lane

    def _eligible(self) -> Iterator[Lane]:
        for kinds, group in self._groups.items():
            full = next((slots for slots in kinds if slots.full), None)
            if full is None:
                yield from islice(group.values(), LOOK_AHEAD)
            else:
                for key in full.holders:
                    yield from self._lanes_for.get((full, key), {}).values()

    def _review(self) -> None:
        """Reserve slots for those that have waited too long, the oldest first."""
        for kinds, group in self._groups.items():
            overdue = [
                lane
                for lane in islice(group.values(), LOOK_AHEAD)
                if self._admission.overdue(lane.requests[0])
                and lane.requests[0].status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
                and not self._admission.admits(lane.requests[0])
            ]
            places = max((slots.reservations for slots in kinds), default=0)
            for lane in heapq.nsmallest(places, overdue, key=lambda lane: lane.number):
                self._admission.claim(lane.requests[0])

    def _remove(self, lane: Lane, gone: set[Any]) -> None:
        removed = [request for request in lane.requests if request in gone]
        lane.requests = deque(request for request in lane.requests if request not in gone)
        for request in removed:
            self._left(request, lane)
        self._ranked = self._chosen = None

    def _left(self, request: Any, lane: Lane) -> None:
        group = self._group(lane)
        lane.arrived -= ticket_of(request).since
        self._length -= 1
        group.length -= 1
        self._unseen.pop(request, None)
        if not lane.requests and lane.needs in group:
            del group[lane.needs]
            for need in lane.needs:
                del self._lanes_for[need][lane.needs]
                if not self._lanes_for[need]:
                    del self._lanes_for[need]

    def _group(self, lane: Lane) -> _Group:
        return self._groups[tuple(slots for slots, _ in lane.needs)]

    def _lane_of(self, request: Any) -> Lane | None:
        needs = tuple(need for need in ticket_of(request).needs if need[0].scarce)
        group = self._groups.get(tuple(slots for slots, _ in needs))
        return None if group is None else group.get(needs)
