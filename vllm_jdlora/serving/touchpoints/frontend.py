"""What the command line and the engine's configuration need of vLLM: checked wherever settings are made."""

from __future__ import annotations

from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

FRONTEND: tuple[Touchpoint, ...] = (
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
)
