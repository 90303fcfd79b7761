"""What admission and the order of requests need of vLLM's scheduler: checked in the engine core."""

from __future__ import annotations

from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

SCHEDULER: tuple[Touchpoint, ...] = (
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.__init__",
        "read",
        "where it keeps requests, in which order, and how many may run",
        ("self", "vllm_config"),
        "engine",
        ("policy", "waiting", "deferred_waiting", "running", "max_num_running_reqs"),
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.add_request",
        "override",
        "a request gets its ticket before it is queued",
        ("self", "request"),
        "engine",
        ("_enqueue_waiting_request",),
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._handle_blocked_waiting_request",
        "override",
        "admits a waiting request only while a slot is free for all that it needs",
        ("self", "request"),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._holds_kv_blocks",
        "call",
        "such requests wait in a queue of vLLM's own, which is walked",
        ("request",),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.get_request_counts",
        "call",
        "how many wait in all queues",
        ("self",),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        "override",
        "what runs is gathered once a step: while it admits, it only appends to the running ones; it asks the waiting "
        "queue whether it is true, peeks, and pops what it has peeked at",
        ("self",),
        "engine",
        ("_handle_blocked_waiting_request", "running", "waiting", "peek_request", "pop_request", "prepend_requests"),
    ),
    Touchpoint(
        "vllm.v1.core.sched.request_queue",
        "RequestQueue",
        "subclass",
        "takes the place of the first-come-first-served queue while slots are scarce",
        (),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.core.sched.request_queue",
        "SchedulingPolicy.FCFS",
        "read",
        "the policy that is given a queue of ours",
        (),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.request",
        "Request",
        "read",
        "its ticket is an attribute of ours; a reservation ends with the request",
        ("lora_request",),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.request",
        "Request.is_finished",
        "call",
        "a reservation of a request that was aborted is void",
        ("self",),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.request",
        "RequestStatus.PREEMPTED",
        "read",
        "with WAITING the states in which only a slot may be missing",
        (),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler",
        "subclass",
        "the same for async scheduling",
        (),
        "engine",
    ),
)
