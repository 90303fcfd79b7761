"""What loads the model and tells a step's requests in a worker: vLLM's workers and model runners."""

from __future__ import annotations

from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

RUNNER: tuple[Touchpoint, ...] = (
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
)
