"""Where a step's time goes: named functions of vLLM's V1 CPU runner and of this package, timed where they are called.

Timers are put on classes after the engine has started, so that compiled code is that of an engine without them. Each
call costs about a microsecond more by its timer. Names that the running versions do not have are reported and left out.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One function: the module, its path inside, and what it is called in the report."""

    module: str
    name: str
    label: str


_RUNNER = "vllm.v1.worker.gpu_model_runner"

POINTS = (
    Point("vllm.v1.core.sched.scheduler", "Scheduler.schedule", "scheduler: schedule"),
    Point("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output", "scheduler: update from output"),
    Point("vllm.v1.engine.output_processor", "OutputProcessor.process_outputs", "engine: process outputs"),
    Point(_RUNNER, "GPUModelRunner.execute_model", "runner: execute model"),
    Point(_RUNNER, "GPUModelRunner._update_states", "update states"),
    Point(_RUNNER, "GPUModelRunner._prepare_inputs", "prepare inputs"),
    Point("vllm.v1.worker.gpu_input_batch", "InputBatch.make_lora_inputs", "adapter of each token"),
    Point("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._apply_adapters", "activate adapters"),
    Point("vllm.lora.model_manager", "LoRAModelManager.set_adapter_mapping", "mapping (stock)"),
    Point("vllm_jdlora.serving.worker_manager", "JDWorkerLoRAManager._apply_adapters", "activate adapters"),
    Point("vllm_jdlora.serving.worker_manager", "JDWorkerLoRAManager.set_active_requests", "active requests"),
    Point("vllm_jdlora.serving.manager", "JDLoRAModelManager.plan", "plan"),
    Point("vllm_jdlora.serving.punica_cpu", "JDPunicaCPU.update_tokens", "plan: groups"),
    Point(_RUNNER, "GPUModelRunner._determine_batch_execution_and_padding", "batch and padding"),
    Point(_RUNNER, "GPUModelRunner._get_slot_mappings", "slot mappings"),
    Point(_RUNNER, "GPUModelRunner._build_attention_metadata", "attention metadata"),
    Point(_RUNNER, "GPUModelRunner._preprocess", "preprocess"),
    Point(_RUNNER, "GPUModelRunner._model_forward", "model forward"),
    Point("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.forward", "attention"),
    Point("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.do_kv_cache_update", "KV cache update"),
    Point("vllm_jdlora.serving.punica_cpu", "LayerPunicaCPU.run", "LoRA operator"),
    Point("vllm.lora.punica_wrapper.punica_cpu", "PunicaWrapperCPU.add_lora_linear", "LoRA operator (stock)"),
    Point("vllm_jdlora.kernels.cpu_grouped", "PackedLinear.add_", "kernel"),
    Point(_RUNNER, "GPUModelRunner.sample_tokens", "runner: sample tokens"),
    Point(_RUNNER, "GPUModelRunner._sample", "sample"),
    Point(_RUNNER, "GPUModelRunner._bookkeeping_sync", "bookkeeping"),
)

STEP = "step"
LOGITS = "logits"
SET_ACTIVE = "set active LoRAs"


class StepTimers:
    """Times every step of an engine that runs in this process."""

    def __init__(self, llm: Any):
        self.missing: list[str] = []
        self._steps: list[dict[str, Any]] = []
        self._stack: list[str] = []
        self._times: dict[str, list[float]] = {}
        self._scheduled: list[int] = [0, 0]
        for point in POINTS:
            self._put_on(point)
        for runner in _runners(llm):
            # The model's class is not known here, and `model` may be wrapped.
            runner.model.compute_logits = self._timed(runner.model.compute_logits, LOGITS)
            # On the object, where this package may have put its own.
            runner.set_active_loras = self._timed(runner.set_active_loras, SET_ACTIVE)
        self._follow_steps(llm.llm_engine)

    def take(self) -> dict[str, Any]:
        """The steps since the last call, and forget them.

        Each has ``tokens`` and ``requests`` of the step and, for each path of labels (``step/…``), seconds and calls.
        """
        steps, self._steps = self._steps, []
        return {"steps": steps, "missing": self.missing}

    def _put_on(self, point: Point) -> None:
        owner: Any
        try:
            owner = importlib.import_module(point.module)
            *path, name = point.name.split(".")
            for part in path:
                owner = getattr(owner, part)
            original = owner.__dict__[name]
        except (ImportError, AttributeError, KeyError):
            self.missing.append(f"{point.module}.{point.name}")
            return
        kind = type(original) if isinstance(original, staticmethod | classmethod) else None
        timed = self._timed(original.__func__ if kind else original, point.label)
        if point.name == "Scheduler.schedule":
            timed = self._counting(timed)
        setattr(owner, name, kind(timed) if kind else timed)

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        stack = self._stack

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            stack.append(label)
            path = "/".join(stack)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                stack.pop()
                entry = self._times.setdefault(path, [0.0, 0])
                entry[0] += seconds
                entry[1] += 1

        return timed

    def _counting(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(schedule)
        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._scheduled = [output.total_num_scheduled_tokens, len(output.num_scheduled_tokens)]
            return output

        return counting

    def _follow_steps(self, engine: Any) -> None:
        step = self._timed(engine.step, STEP)

        @functools.wraps(engine.step)
        def followed() -> Any:
            self._times = {}
            outputs = step()
            tokens, requests = self._scheduled
            self._steps.append({"tokens": tokens, "requests": requests, "times": self._times})
            return outputs

        engine.step = followed


def _runners(llm: Any) -> list[Any]:
    """The model runner of an engine whose worker is in this process."""
    worker = llm.llm_engine.model_executor.driver_worker
    worker = getattr(worker, "worker", worker)
    return [worker.model_runner]
