"""The register of every vLLM name that this package subclasses, wraps or calls, and the start-up check.

vLLM's LoRA internals are not a public interface. What is relied upon is written down here once, with the reason,
and compared with the running vLLM before anything is served: a difference is an error that names it, never a
server that quietly answers with uncompressed or wrong adapters.
"""

from __future__ import annotations

import importlib
import inspect
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from vllm_jdlora.errors import JDLoRAError

VERIFIED_VERSIONS = ("0.32", "0.33")
ALLOW_UNVERIFIED = "JDLORA_ALLOW_UNVERIFIED_VLLM"


@dataclass(frozen=True)
class Touchpoint:
    """One name of vLLM.

    Attributes:
        module: import path.
        name: attribute path inside the module, ``Class.method`` for methods.
        how: ``subclass``, ``wrap``, ``override``, ``call`` or ``read``.
        why: what it is used for.
        parameters: parameters that must exist, in this order among the others; empty for no check.
        uses: names that the function's own code must mention: what it reads, and what it calls that we replace.
        where: ``frontend`` names are checked in every process, ``engine`` names in the engine core, ``worker`` names
            in the workers, ``cuda`` names in workers on CUDA, ``metrics`` names in an API server's statistics,
            ``api_server`` names in its serving of requests.
    """

    module: str
    name: str
    how: str
    why: str
    parameters: tuple[str, ...] = ()
    where: str = "worker"
    uses: tuple[str, ...] = ()


_MANAGER = "vllm.lora.model_manager"
_WORKER_MANAGER = "vllm.lora.worker_manager"

REGISTER: tuple[Touchpoint, ...] = (
    Touchpoint(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "wrap",
        "adds the flags; serve, bench and run-batch all build their parsers with it",
        ("parser",),
        "frontend",
    ),
    Touchpoint(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        "wrap",
        "turns the flags into additional_config, lora_modules and middleware on the namespace, which spawned API "
        "servers inherit",
        ("args",),
        "frontend",
    ),
    Touchpoint(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "wrap",
        "sets LoRA sizes, worker and scheduler; the one place that serve and offline LLM(...) share. Its usage_context "
        "tells an API server from others, headless and the process's rank one that only starts engines or servers",
        ("self", "usage_context", "headless"),
        "frontend",
        ("_api_process_count", "_api_process_rank"),
    ),
    Touchpoint(
        "vllm.config.lora",
        "LoRAConfig.compute_hash",
        "read",
        "max_loras is in the compile key: it is set to the most requests of a batch, whatever the collection's size",
        ("self",),
        "frontend",
        ("max_loras",),
    ),
    Touchpoint(
        "vllm.config",
        "VllmConfig.compute_hash",
        "read",
        "asks an additional_config that is no dict for its own digest: a collection is no part of the compile key",
        ("self",),
        "frontend",
        ("additional_config", "compute_hash"),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.protocol",
        "LoRAModulePath",
        "call",
        "adapters that are given by hand beside a collection",
        ("name", "path"),
        "frontend",
    ),
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
    Touchpoint(
        "vllm.v1.worker.gpu_worker",
        "Worker.init_device",
        "override",
        "the model runner exists after it and has not yet loaded the model",
        ("self",),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_worker",
        "Worker.load_model",
        "override",
        "proves after loading that our manager is in place",
        ("self",),
    ),
    Touchpoint(
        "vllm.model_executor.layers.fused_moe.layer",
        "FusedMoEConfig",
        "wrap",
        "while a model is loaded: experts are built as without LoRA, which they never carry",
        ("is_lora_enabled",),
    ),
    Touchpoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.load_lora_model",
        "override",
        "set on the runner instance: the stock method names its manager class itself",
        ("self", "model", "vllm_config", "device"),
    ),
    Touchpoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.set_active_loras",
        "override",
        "set on the runner instance: tells the manager requests, not a tuple of tokens (V1 runners)",
        ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens", "mapping_type"),
        uses=("make_lora_inputs", "_set_active_loras"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._prepare_inputs",
        "read",
        "calls set_active_loras in each step, with tokens by request in the order of the input batch",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        uses=("set_active_loras", "input_batch"),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.make_lora_inputs",
        "read",
        "its place is taken: the attributes that it reads say who is in a step (V1 runners)",
        ("self", "num_scheduled_tokens"),
        uses=("request_lora_mapping", "num_reqs", "lora_id_to_lora_request"),
    ),
    Touchpoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin._set_active_loras",
        "override",
        "set on the runner instance: the same for V2 runners, which call it with what make_lora_inputs returns",
        ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type"),
        uses=("lora_manager", "set_active_adapters"),
    ),
    Touchpoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.maybe_setup_dummy_loras",
        "wrap",
        "set on the runner instance: warm-up makes a request for each of max_loras, which counts Σ slots here",
        ("self", "lora_config"),
        uses=("max_loras",),
    ),
    Touchpoint(
        "vllm.v1.worker.lora_model_runner_mixin",
        "LoRAModelRunnerMixin.maybe_select_dummy_loras",
        "wrap",
        "the same",
        ("self", "lora_config", "num_scheduled_tokens"),
        uses=("max_loras",),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.make_lora_inputs",
        "override",
        "set on the runner's LoraState: requests, not tokens (V2 runners)",
        ("self", "req_ids", "idx_mapping", "num_scheduled_tokens"),
        uses=("lora_ids",),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.lora_utils",
        "LoraState.get_activate_loras",
        "read",
        "the requests' adapters are read as it reads them (V2 runners)",
        ("self", "req_ids"),
        uses=("lora_requests",),
    ),
    Touchpoint(
        "vllm.v1.worker.gpu.model_runner",
        "GPUModelRunner.execute_model",
        "read",
        "hands the result of make_lora_inputs to _set_active_loras in each step (V2 runners)",
        ("self", "scheduler_output"),
        "cuda",
        ("lora_state", "make_lora_inputs", "_set_active_loras"),
    ),
    Touchpoint(
        "vllm.lora.request",
        "LoRARequest",
        "read",
        "an id and a path say which adapter a request wants; load_inplace asks to read a plain one again",
        ("lora_name", "lora_int_id", "lora_path", "load_inplace"),
    ),
    Touchpoint(
        _WORKER_MANAGER,
        "LRUCacheWorkerLoRAManager.add_adapter",
        "override",
        "compressed adapters are looked up, not loaded; membership in O(1)",
        ("self", "lora_request"),
    ),
    Touchpoint(
        _WORKER_MANAGER,
        "LRUCacheWorkerLoRAManager._apply_adapters",
        "override",
        "the stock method limits the batch to the number of base slots",
        ("self", "lora_requests"),
    ),
    Touchpoint(
        _WORKER_MANAGER,
        "WorkerLoRAManager._load_adapter",
        "call",
        "plain adapters are loaded as stock loads them",
        ("self", "lora_request"),
    ),
    Touchpoint(
        _WORKER_MANAGER,
        "WorkerLoRAManager.add_dummy_lora",
        "override",
        "warm-up needs no weights: a dummy is a row of zeros",
        ("self", "lora_request", "rank"),
    ),
    Touchpoint(
        _WORKER_MANAGER,
        "LRUCacheWorkerLoRAManager.create_lora_manager",
        "call",
        "builds the manager through _manager_cls",
        ("self", "model", "vllm_config"),
    ),
    Touchpoint(_WORKER_MANAGER, "LRUCacheWorkerLoRAManager._manager_cls", "override", "names our manager class"),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager.__init__",
        "subclass",
        "called with a LoRA config whose slots are bases",
        (
            "model",
            "max_num_seqs",
            "max_num_batched_tokens",
            "vocab_size",
            "lora_config",
            "device",
            "vllm_config",
        ),
    ),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager._init_punica_wrapper",
        "override",
        "puts our punica wrapper under the language model",
        ("self", "max_num_batched_tokens", "vllm_config"),
    ),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager.set_adapter_mapping",
        "override",
        "vLLM's way in for warm-up and graph capture: plans by base and scaling slot, makes nothing of vLLM's",
        ("self", "mapping"),
    ),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager._deactivate_adapter",
        "override",
        "a plain adapter that leaves its slot makes the plan stale",
        ("self", "lora_id"),
        uses=("lora_index_to_id",),
    ),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager.activate_adapter",
        "read",
        "its places in lora_index_to_id are the base slots that kernels get",
        ("self", "lora_id"),
        uses=("lora_index_to_id", "_active_adapters", "_registered_adapters"),
    ),
    Touchpoint(
        "vllm.utils.cache",
        "LRUCache.touch",
        "call",
        "plain adapters of a step that is not planned anew count as just used",
        ("self", "key"),
    ),
    Touchpoint(
        _MANAGER,
        "LRUCacheLoRAModelManager.add_adapter",
        "call",
        "registers bases and plain adapters",
        ("self", "lora"),
    ),
    Touchpoint(
        _MANAGER,
        "LRUCacheLoRAModelManager.activate_adapter",
        "override",
        "copies Σ for compressed adapters, stock for plain ones",
        ("self", "lora_id"),
    ),
    Touchpoint(
        _MANAGER,
        "LRUCacheLoRAModelManager.pin_adapter",
        "override",
        "bases are pinned; a pinned Σ is never evicted",
        ("self", "lora_id"),
    ),
    Touchpoint(
        _MANAGER,
        "LoRAModelManager.remove_adapter",
        "override",
        "forgets a compressed adapter",
        ("self", "adapter_id"),
    ),
    Touchpoint(_MANAGER, "LoRAModelManager.list_adapters", "override", "bases are not adapters", ("self",)),
    Touchpoint(_MANAGER, "LoRAModelManager.get_adapter", "override", "compressed ids", ("self", "adapter_id")),
    Touchpoint(_MANAGER, "LoRAModelManager.remove_all_adapters", "override", "keeps the bases", ("self",)),
    Touchpoint(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA.set_mapping",
        "call",
        "gives each layer its own view of Σ",
        ("self", "punica_wrapper"),
    ),
    Touchpoint(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA.set_lora",
        "wrap",
        "on CPU each slot that vLLM writes is laid down again as the kernel reads it; on CUDA it is called to cut a "
        "worker's share of bases of 8 bits into buffers that stand in for lora_a_stacked and lora_b_stacked",
        ("self", "index", "lora_a", "lora_b"),
        uses=("reset_lora", "lora_a_stacked", "lora_b_stacked"),
    ),
    Touchpoint(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA.reset_lora",
        "wrap",
        "the same for a slot that is cleared",
        ("self", "index"),
        uses=("lora_a_stacked", "lora_b_stacked"),
    ),
    Touchpoint(
        "vllm.lora.layers.column_parallel_linear",
        "MergedColumnParallelLinearWithLoRA.set_lora",
        "wrap",
        "the same for packed modules",
        ("self", "index", "lora_a", "lora_b"),
        uses=("reset_lora", "lora_a_stacked", "lora_b_stacked"),
    ),
    Touchpoint(
        "vllm.lora.lora_weights",
        "LoRALayerWeights.__init__",
        "call",
        "a base is handed over as a LoRA",
        ("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b"),
    ),
    Touchpoint(
        "vllm.lora.lora_model",
        "LoRAModel.__init__",
        "call",
        "a cluster is handed over as a LoRA",
        ("self", "lora_model_id", "rank", "loras"),
    ),
    Touchpoint(
        "vllm.lora.utils",
        "parse_fine_tuned_lora_name",
        "call",
        "maps PEFT's module names as vLLM maps them",
        ("name", "weights_mapper"),
    ),
    Touchpoint(
        "vllm.forward_context",
        "get_forward_context",
        "call",
        "operators find their layer in no_compile_layers, which is compilation_config.static_forward_context",
    ),
    Touchpoint(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.update_metadata",
        "override",
        "must not be called: the layers that read what it makes are refused",
        ("self", "mapping"),
    ),
    Touchpoint(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_lora_linear",
        "override",
        "every linear LoRA layer adds its adapter's part through it",
        ("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
    ),
    Touchpoint(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_shrink",
        "override",
        "fully sharded layers gather between it and add_expand",
        ("self", "y", "x", "lora_a_stacked", "scale"),
        "cuda",
    ),
    Touchpoint(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_expand",
        "override",
        "applies Σ after the gather of fully sharded layers",
        ("self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
        "cuda",
    ),
    Touchpoint(
        "vllm.envs",
        "VLLM_BATCH_INVARIANT",
        "read",
        "asks for equal bits of a request in any batch",
        (),
        "cuda",
    ),
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
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.__init__",
        "read",
        "lora_requests, lora_resolver_lock and the ids' counter get the collection's adapters and tables of ours",
        ("self", "engine_client", "base_model_paths", "lora_modules"),
        "api_server",
        ("lora_requests", "lora_id_counter", "lora_resolver_lock", "lora_resolvers", "registry"),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.init_static_loras",
        "wrap",
        "enters the collection's adapters before those that are given by hand, without a call to the engine for each",
        ("self",),
        "api_server",
        ("load_lora_adapter",),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.load_lora_adapter",
        "override",
        "set on the instance: projects the adapter on the collection's bases",
        ("self", "request", "base_model_name"),
        "api_server",
        ("_check_load_lora_adapter_request", "lora_requests", "lora_id_counter"),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.unload_lora_adapter",
        "override",
        "set on the instance: has the engine forget the adapter too",
        ("self", "request"),
        "api_server",
        ("_check_unload_lora_adapter_request", "lora_requests"),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIServingModels.resolve_lora",
        "override",
        "set on the instance: looks into the folder of --jd-adapter-dir, then as vLLM does",
        ("self", "lora_name"),
        "api_server",
        ("lora_resolvers", "lora_resolver_lock", "lora_requests"),
    ),
    Touchpoint(
        "vllm.entrypoints.openai.models.serving",
        "OpenAIModelRegistry.show_available_models",
        "call",
        "the base models' cards in /v1/models",
        ("self",),
        "api_server",
    ),
    Touchpoint(
        "vllm.entrypoints.serve.engine.protocol",
        "ModelCard",
        "call",
        "an adapter's card in /v1/models is filled into one of vLLM's",
        ("id", "root", "parent", "permission"),
        "api_server",
    ),
    Touchpoint(
        "vllm.entrypoints.serve.engine.serving",
        "BaseServing._get_active_default_mm_loras",
        "wrap",
        "compares a request to the base model with every adapter's name; looks names up instead",
        ("self", "request"),
        "api_server",
        ("_get_message_types", "lora_requests"),
    ),
    Touchpoint(
        "vllm.entrypoints.serve.engine.serving",
        "BaseServing._maybe_get_adapters",
        "read",
        "a name becomes a request for the engine by one lookup",
        ("self", "request"),
        "api_server",
        ("lora_requests",),
    ),
    Touchpoint(
        "vllm.entrypoints.serve",
        "create_error_response",
        "call",
        "errors in the form of vLLM's own",
        ("message", "err_type", "status_code", "param"),
        "api_server",
    ),
    Touchpoint(
        "vllm.entrypoints.serve.middleware.register",
        "init_entrypoints_middleware",
        "read",
        "brings our middleware, a class by its import path, into the application",
        ("args", "app"),
        "api_server",
        ("middleware", "add_middleware"),
    ),
    Touchpoint(
        "vllm.entrypoints.launchers.api_server.app_state",
        "init_app_state",
        "read",
        "what our routes find in the application's state when it starts",
        ("engine_client", "state", "args"),
        "api_server",
        ("openai_serving_models", "init_static_loras", "lora_modules"),
    ),
    Touchpoint(
        "vllm.lora.utils",
        "get_adapter_absolute_path",
        "call",
        "adapters that are loaded at run time may be on a model hub",
        ("lora_path",),
        "api_server",
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.generate",
        "wrap",
        "set on the instance: an adapter that was replaced is kept until its last request has ended",
        ("self", "prompt", "sampling_params", "request_id", "lora_request"),
        "api_server",
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.encode",
        "wrap",
        "the same for pooling",
        ("self", "prompt", "pooling_params", "request_id", "lora_request"),
        "api_server",
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.add_lora",
        "call",
        "shows the engine an adapter that came at run time",
        ("self", "lora_request"),
        "api_server",
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.remove_lora",
        "call",
        "has it forgotten",
        ("self", "lora_id"),
        "api_server",
    ),
    Touchpoint(
        "vllm.v1.engine.async_llm",
        "AsyncLLM.collective_rpc",
        "call",
        "gives the workers another revision of the collection",
        ("self", "method", "timeout", "args"),
        "api_server",
    ),
)


def check(where: str) -> None:
    """Compare the running vLLM with the register.

    Args:
        where: ``frontend``, ``engine``, ``worker``, ``cuda``, ``metrics`` or ``api_server``; ``cuda`` includes
            ``worker``.

    Raises:
        JDLoRAError: with every difference and what to do.
    """
    kinds = {"worker", "cuda"} if where == "cuda" else {where}
    differences = [d for point in REGISTER if point.where in kinds and (d := _difference(point))]
    version = metadata.version("vllm")
    if not version.startswith(tuple(f"{v}." for v in VERIFIED_VERSIONS)) and not os.environ.get(ALLOW_UNVERIFIED):
        differences.append(f"version {version} has not been verified (set {ALLOW_UNVERIFIED}=1 to try it)")
    if differences:
        raise JDLoRAError(
            f"vllm {version} does not fit this vllm_jdlora, which is verified with {' and '.join(VERIFIED_VERSIONS)}: "
            + "; ".join(differences)
            + ". Install a verified vllm, or a newer vllm_jdlora."
        )


def _difference(point: Touchpoint) -> str | None:
    try:
        target: Any = importlib.import_module(point.module)
        for part in point.name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        return f"{point.module}.{point.name} is missing ({error})"
    if point.uses and (missing := [name for name in point.uses if name not in _names_in(target)]):
        return f"{point.module}.{point.name} no longer uses {', '.join(missing)}"
    if not point.parameters:
        return None
    present = list(inspect.signature(target).parameters)
    wanted = [p for p in point.parameters if p in present]
    if list(point.parameters) != wanted or sorted(wanted, key=present.index) != wanted:
        return f"{point.module}.{point.name} takes ({', '.join(present)}), not ({', '.join(point.parameters)})"
    return None


def _names_in(function: Any) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names
