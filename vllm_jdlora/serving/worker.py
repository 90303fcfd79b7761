"""The vLLM worker for compressed adapters: the platform's own, with another LoRA manager."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving import expert_layers, kept_compilation, step_requests, touchpoints
from vllm_jdlora.serving.statistics_carrier import ReportingWorker

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
elif current_platform.is_cuda_alike():
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker
else:
    raise JDLoRAError(f"compressed LoRA runs on CPU and CUDA, not on {current_platform.device_name}")


class JDWorker(ReportingWorker, PlatformWorker):
    """Loads the model with :class:`~vllm_jdlora.serving.worker_manager.JDWorkerLoRAManager` in place of vLLM's."""

    def init_device(self) -> None:
        touchpoints.check("worker" if current_platform.is_cpu() else "cuda")
        super().init_device()
        # On the instance, so that no global of vLLM changes in this process.
        self.model_runner.load_lora_model = functools.partial(_load_lora_model, self.model_runner)
        step_requests.take_over(self.model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        from vllm_jdlora.serving.worker_manager import JDWorkerLoRAManager

        with expert_layers.built_without_lora():
            result = super().load_model(*args, **kwargs)
        manager = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(manager, JDWorkerLoRAManager):
            raise JDLoRAError(
                f"the model was loaded with {type(manager).__name__} and not with the manager for compressed "
                "adapters: another plugin replaced it, or this vLLM loads LoRA in another way"
            )
        return result

    def determine_available_memory(self) -> int:
        # The CPU's worker compiles here.
        with kept_compilation.loads():
            available: int = super().determine_available_memory()
        return available

    def jdlora_load_collection(self, path: str, revision: str, beside: bool = False) -> dict[str, Any]:
        """Serve another revision of the collection from now on; ``collective_rpc("jdlora_load_collection", …)``.

        What it does and raises, and what must not run then:
        :meth:`~vllm_jdlora.serving.manager.JDLoRAModelManager.load_collection`.
        """
        result: dict[str, Any] = self.model_runner.lora_manager._adapter_manager.load_collection(path, revision, beside)
        return result

    def jdlora_statistics(self) -> dict[str, Any]:
        """Counts of this worker; ``LLM.collective_rpc("jdlora_statistics")``."""
        return self.model_runner.lora_manager._adapter_manager.statistics()


def _load_lora_model(runner: Any, model: torch.nn.Module, vllm_config: Any, device: torch.device) -> torch.nn.Module:
    """``LoRAModelRunnerMixin.load_lora_model`` with our manager class."""
    from vllm.model_executor.models import supports_lora

    from vllm_jdlora.serving.worker_manager import JDWorkerLoRAManager

    if not supports_lora(model):
        raise JDLoRAError(f"{type(model).__name__} does not support LoRA in vLLM")
    _refuse_weights_out_of_reach(model)
    runner.lora_manager = JDWorkerLoRAManager(vllm_config, device, model.embedding_modules)
    return runner.lora_manager.create_lora_manager(model, vllm_config)


def _refuse_weights_out_of_reach(model: torch.nn.Module) -> None:
    """vLLM's LoRA layers ask the weight for its device; int8 kernels on CPU keep it to themselves."""
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and getattr(module, "weight", module) is None:
            raise JDLoRAError(
                f"{name} is quantised in a way whose weights vLLM's LoRA layers cannot see on this platform: no LoRA "
                "is served on it, compressed or not; take the base model unquantised or as GPTQ"
            )
