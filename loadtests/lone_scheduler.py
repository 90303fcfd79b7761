"""The real vLLM scheduler without an engine: a model of one layer that nobody loads, and steps that compute nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_jdlora.serving.options import AdapterPath, ServingOptions
from vllm_jdlora.serving.scheduler import jd_scheduler

BLOCK = 16
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
_PLENTY = 10**5
_numbers = itertools.count()


def slot_options(**settings: Any) -> ServingOptions:
    """Of a server whose slots never bind, but for those given."""
    return ServingOptions("collection", "r", **{"scaling_slots": _PLENTY, "plain_slots": _PLENTY, **settings})


def lone_scheduler(
    folder: Path,
    options: ServingOptions | None,
    *,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    kv_blocks: int = 100_000,
    policy: str = "fcfs",
    max_loras: int | None = None,
    make: Callable[..., Scheduler] | None = None,
) -> Scheduler:
    """The scheduler that a server with these options has; without options vLLM's own.

    Args:
        folder: a model's config.json is written there.
        kv_blocks: of 16 tokens each.
        max_loras: vLLM's limit; as many as there are slots if not given.
        make: in place of the scheduler factory that the options choose.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_MODEL))
    slots = _PLENTY if options is None else (options.scaling_slots or 0) + (options.plain_slots or 0)
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", seed=0),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=4096,
            is_encoder_decoder=False,
            policy=policy,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=False, kv_cache_memory_bytes=1 << 20),
        device_config=DeviceConfig("cpu"),
        lora_config=LoRAConfig(max_lora_rank=16, max_loras=max_loras or slots, lora_dtype="auto"),
        additional_config={} if options is None else options.put_into({}),
    )
    config.cache_config.num_gpu_blocks = kv_blocks
    layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(kv_blocks, [], [KVCacheGroupSpec(["layer"], layer)])
    make = make or (Scheduler if options is None else jd_scheduler)
    return make(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def compressed_adapter(number: int, cluster: int, *, revision: str = "r") -> LoRARequest:
    return LoRARequest(f"a{number}", number + 1, str(AdapterPath(revision, cluster, f"a{number}")))


def plain_adapter(number: int) -> LoRARequest:
    return LoRARequest(f"p{number}", 10**6 + number, f"/adapters/p{number}")


def new_request(lora: LoRARequest | None, *, prompt: int = 16, answer: int = 8, priority: int = 0) -> Request:
    """A request of so many prompt tokens that is answered with exactly so many."""
    return Request(
        request_id=f"request-{next(_numbers)}",
        prompt_token_ids=[1] * prompt,
        sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
        pooling_params=None,
        lora_request=lora,
        priority=priority,
    )


def finish_step(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Give the scheduler a token for each request whose prompt is computed."""
    ids = list(output.num_scheduled_tokens)
    sampled: list[Any] = [[] if scheduler.requests[i].is_prefill_chunk else [2] for i in ids]
    scheduler.update_from_output(output, ModelRunnerOutput(ids, {name: n for n, name in enumerate(ids)}, sampled))


def run_step(scheduler: Scheduler) -> SchedulerOutput:
    output = scheduler.schedule()
    finish_step(scheduler, output)
    return output
