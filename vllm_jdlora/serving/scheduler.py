"""The scheduler's part: a batch never holds more adapters or clusters than there are slots, and none waits for ever.

vLLM knows one limit, ``max_loras``. Compressed adapters are limited by the Σ slots, plain ones by the LoRA slots that
the bases leave, clusters by the base slots; without this a full batch would evict weights that it is about to use.
While no limit can bind, vLLM's own queue and order are in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_jdlora.serving import touchpoints
from vllm_jdlora.serving.admission import Admission
from vllm_jdlora.serving.cluster_order import ClusterQueue
from vllm_jdlora.serving.failed_adapters import EndsFailedRequests
from vllm_jdlora.serving.lane_queue import LaneQueue
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.statistics_carrier import ReportingScheduler


class _SlotLimits(ReportingScheduler, EndsFailedRequests):
    """Mix-in before a vLLM scheduler."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    """Seconds; what waiting is measured by."""

    def __init__(self, *, vllm_config: Any, **kwargs: Any):
        touchpoints.check("engine")
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        assert options is not None
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._admission = Admission(options, self.max_num_running_reqs, self.clock)  # type: ignore[attr-defined]

    def add_request(self, request: Any) -> None:
        slots_became_scarce = self._admission.arrive(request)
        if slots_became_scarce and self.policy == SchedulingPolicy.FCFS:  # type: ignore[attr-defined]
            self._make_lanes()
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        if self._admission.scarce:
            self._admission.begin_step(self.running)  # type: ignore[attr-defined]
            if isinstance(self.waiting, LaneQueue):
                self.waiting.begin_step()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        if not super()._handle_blocked_waiting_request(request):  # type: ignore[misc]
            return False
        if not self._admission.scarce or self._admission.admits(request):
            return True
        self._admission.turn_away(request)
        # Lanes are looked through for the oldest; what is looked at here is any of those that wait.
        if not isinstance(self.waiting, LaneQueue) or self._holds_kv_blocks(request):  # type: ignore[attr-defined]
            self._admission.claim(request)
        return False

    def waiting_by_reason(self) -> dict[str, int]:
        """Waiting requests by the kind of slot that they wait for, and those that wait for anything ``other``."""
        if not self._admission.scarce:
            lacking: dict[str, int] = {}
        elif isinstance(self.waiting, LaneQueue):
            lacking = self.waiting.waiting_by_reason()
        else:
            lacking = self._admission.turned_away
        _, waiting = self.get_request_counts()  # type: ignore[attr-defined]
        return {**lacking, "other": waiting - sum(lacking.values())}

    def _make_lanes(self) -> None:
        """Lay the waiting requests out by the slots that they need; anew when another kind of slot becomes scarce."""
        deferred: set[Any] = self.deferred_waiting  # type: ignore[attr-defined]
        queue = ClusterQueue if self._admission.orders_clusters else LaneQueue
        self.waiting: Any = queue(self._admission, self.waiting, deferred)


class JDScheduler(_SlotLimits, Scheduler):
    """For synchronous scheduling (CPU)."""


class JDAsyncScheduler(_SlotLimits, AsyncScheduler):
    """For asynchronous scheduling (the default on CUDA)."""


def jd_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that fits vLLM's own choice; vLLM calls it in place of a scheduler class."""
    scheduler = JDAsyncScheduler if vllm_config.scheduler_config.async_scheduling else JDScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
