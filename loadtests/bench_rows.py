"""The rows of the throughput table: what each engine is, and what it needs to be started."""

from __future__ import annotations

from typing import Any

from vllm_jdlora.collection import Collection
from vllm_jdlora.serving.options import adapter_paths

MAX_TOKENS = 2048


def engine_options(dtype: str, batch: int, *, eager: bool = False) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that all engines share."""
    return {
        "dtype": dtype,
        "max_model_len": MAX_TOKENS,
        "max_num_seqs": batch,
        "max_num_batched_tokens": MAX_TOKENS,
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": eager,
    }


def jd_options(collection: Collection, options: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Adapters and arguments of an engine that serves `collection`."""
    return adapter_paths(collection), {**options, "additional_config": {"jdlora": {"collection": str(collection.path)}}}
