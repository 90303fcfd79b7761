"""The scheduler's part: a batch never holds more adapters of a kind than there are slots of that kind.

vLLM knows one limit, ``max_loras``. Compressed adapters are limited by the Σ slots, plain ones by the LoRA slots
that the bases leave; without this a full batch would evict weights that it is about to use.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_jdlora.serving import touchpoints
from vllm_jdlora.serving.options import PATH_SCHEME, ServingOptions


class _SlotLimits:
    """Mix-in before a vLLM scheduler."""

    def __init__(self, *, vllm_config: Any, **kwargs: Any):
        touchpoints.check("engine")
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        assert options is not None and options.scaling_slots is not None and options.plain_slots is not None
        self._slots = {True: options.scaling_slots, False: options.plain_slots}
        self._running_ids: dict[bool, set[int]] = {True: set(), False: set()}
        self._counted = 0
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._running_ids = {True: set(), False: set()}
        self._counted = 0
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return super()._handle_blocked_waiting_request(request) and self._has_slot(request)  # type: ignore[misc]

    def _has_slot(self, request: Any) -> bool:
        """O(1) for each waiting request, and one look at each running one in a step."""
        if request.lora_request is None:
            return True
        compressed = _is_compressed(request)
        running: list[Any] = self.running  # type: ignore[attr-defined]
        if len(running) < self._slots[compressed]:
            return True  # each with an adapter of its own at most
        # While requests are admitted vLLM only appends to the running ones.
        for r in running[self._counted :]:
            if r.lora_request is not None:
                self._running_ids[_is_compressed(r)].add(r.lora_request.lora_int_id)
        self._counted = len(running)
        ids = self._running_ids[compressed]
        return request.lora_request.lora_int_id in ids or len(ids) < self._slots[compressed]


def _is_compressed(request: Any) -> bool:
    return request.lora_request.lora_path.startswith(PATH_SCHEME)


class JDScheduler(_SlotLimits, Scheduler):
    """For synchronous scheduling (CPU)."""


class JDAsyncScheduler(_SlotLimits, AsyncScheduler):
    """For asynchronous scheduling (the default on CUDA)."""


def jd_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that fits vLLM's own choice; vLLM calls it in place of a scheduler class."""
    scheduler = JDAsyncScheduler if vllm_config.scheduler_config.async_scheduling else JDScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
