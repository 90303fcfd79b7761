"""How counts travel from a worker to ``/metrics``: vLLM's outputs, statistics and loggers, in three processes."""

from __future__ import annotations

from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

STATISTICS: tuple[Touchpoint, ...] = (
    Touchpoint(
        "vllm.v1.worker.gpu_worker",
        "Worker.execute_model",
        "override",
        "hangs the worker's counts on a step's output",
        ("self", "scheduler_output"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_worker",
        "Worker.sample_tokens",
        "override",
        "the same where a step ends in sampling",
        ("self", "grammar_output"),
    ),
    Touchpoint(
        "vllm.v1.outputs",
        "AsyncModelRunnerOutput.get_output",
        "subclass",
        "the same for an output that is still being computed",
        ("self",),
    ),
    Touchpoint(
        "vllm.v1.outputs",
        "EMPTY_MODEL_RUNNER_OUTPUT",
        "read",
        "one object that many steps share, so nothing is hung on it",
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        "override",
        "takes the worker's counts off a step's output before the step's statistics are made, and ends requests whose "
        "adapter could not be read",
        ("self", "scheduler_output", "model_runner_output"),
        "engine",
        ("make_stats", "grammar_compile_error_reqs", "sampled_token_ids", "req_id_to_index"),
    ),
    Touchpoint(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.make_stats",
        "override",
        "sends the counts to an API server with the scheduler's statistics",
        ("self",),
        "engine",
        ("SchedulerStats",),
    ),
    Touchpoint(
        "vllm.v1.metrics.stats",
        "SchedulerStats",
        "read",
        "carries the counts in its dictionary of requests by stage, the adapters with requests in the other two",
        ("num_kv_fetch_reqs_by_stage", "waiting_lora_adapters", "running_lora_adapters"),
        "engine",
    ),
    Touchpoint(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        "read",
        "loggers of plugins come first, and one that is a PrometheusStatLogger takes the place of vLLM's own",
        ("self", "vllm_config", "engine_idxs", "custom_stat_loggers"),
        "metrics",
        ("PrometheusStatLogger",),
    ),
    Touchpoint(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger.__init__",
        "subclass",
        "makes vLLM's metrics, and vllm:lora_requests_info without a series",
        ("self", "vllm_config", "engine_indexes"),
        "metrics",
        ("per_engine_labelvalues", "gauge_lora_info"),
    ),
    Touchpoint(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger.record",
        "override",
        "records a step's counts; passes over vllm:lora_requests_info where its gauge is None, and over entries of "
        "num_kv_fetch_reqs_by_stage that it does not know",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        "metrics",
        ("gauge_lora_info", "running_lora_adapters", "waiting_lora_adapters", "num_kv_fetch_reqs_by_stage", "get"),
    ),
    Touchpoint(
        "vllm.v1.metrics.loggers",
        "PrometheusStatLogger.log_engine_initialized",
        "override",
        "logs what is served once the engine is ready",
        ("self",),
        "metrics",
    ),
)
