"""The order of admission where base slots are scarce: a step touches few clusters, and bases are seldom swapped.

Requests whose cluster runs go first, as they need no base slot more. A free base slot goes to a cluster whose bases
are still on the device from its last use, else to the one whose requests have waited for most seconds in all, so that
a swap serves many of them. One admission in a few is the oldest request's, if it has waited longer than the age cap:
requests of popular clusters cannot pass it for ever. In seconds: from a load that is served to twice of it, no request
waits longer than the one that waits longest first come, first served, and the age cap
(``tests/loadtests/test_simulate_scheduler.py``); answers under way are never cut short for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_jdlora.serving.admission import Admission
from vllm_jdlora.serving.lane_queue import Lane, LaneQueue

OLDEST_SHARE = 4
"""One admission in so many goes by age alone where requests have waited too long."""


class ClusterQueue(LaneQueue):
    """Lanes in the order of what their clusters cost and give."""

    def __init__(self, admission: Admission, requests: Iterable[Any], deferred: set[Any]):
        assert admission.bases is not None
        self._bases = admission.bases
        self._resident: dict[Any, None] = {}
        self._admitted = 0
        super().__init__(admission, requests, deferred)

    def begin_step(self) -> None:
        super().begin_step()
        # As workers do: what ran in the last step was used last, and what was not used for longest is evicted.
        for cluster in self._bases.holders:
            self._resident.pop(cluster, None)
            self._resident[cluster] = None
        while len(self._resident) > self._bases.limit:
            del self._resident[next(iter(self._resident))]

    def pop_request(self) -> Any:
        self._admitted += 1
        return super().pop_request()

    def _choose(self) -> Lane | None:
        if self._admitted % OLDEST_SHARE == 0:
            oldest = min(self._eligible(), key=lambda lane: lane.number, default=None)
            if oldest is not None:
                first = oldest.requests[0]
                if self._admission.overdue(first) and self._admission.admits(first):
                    return oldest
        return super()._choose()

    def _rank(self, lane: Lane) -> tuple[Any, int, Lane]:
        cluster = next((key for slots, key in lane.needs if slots is self._bases), None)
        if cluster is None or cluster in self._bases.holders:
            order = (0, 0.0)
        else:
            waited = len(lane.requests) * self._admission.now - lane.arrived
            order = (1 if cluster in self._resident else 2, -waited)
        return (*order, lane.number), lane.number, lane
