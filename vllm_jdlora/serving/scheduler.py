"""The scheduler's part: a batch never holds more adapters of a kind than there are slots of that kind.

vLLM knows one limit, ``max_loras``. Compressed adapters are limited by the Σ slots, plain ones by the LoRA slots
that the bases leave; without this a full batch would evict weights that it is about to use.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_jdlora.serving import touchpoints
from vllm_jdlora.serving.options import ServingOptions, parse_adapter_path


class _SlotLimits:
    """Mix-in before a vLLM scheduler."""

    def __init__(self, *, vllm_config: Any, **kwargs: Any):
        touchpoints.check("engine")
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        assert options is not None and options.scaling_slots is not None and options.plain_slots is not None
        self._slots = {True: options.scaling_slots, False: options.plain_slots}
        super().__init__(vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return super()._handle_blocked_waiting_request(request) and self._has_slot(request)  # type: ignore[misc]

    def _has_slot(self, request: Any) -> bool:
        if request.lora_request is None:
            return True
        compressed = _is_compressed(request)
        running = {
            r.lora_request.lora_int_id
            for r in self.running  # type: ignore[attr-defined]
            if r.lora_request is not None and _is_compressed(r) == compressed
        }
        return request.lora_request.lora_int_id in running or len(running) < self._slots[compressed]


def _is_compressed(request: Any) -> bool:
    return parse_adapter_path(request.lora_request.lora_path) is not None


class JDScheduler(_SlotLimits, Scheduler):
    """For synchronous scheduling (CPU)."""


class JDAsyncScheduler(_SlotLimits, AsyncScheduler):
    """For asynchronous scheduling (the default on CUDA)."""


def jd_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that fits vLLM's own choice; vLLM calls it in place of a scheduler class."""
    scheduler = JDAsyncScheduler if vllm_config.scheduler_config.async_scheduling else JDScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
