"""The worker's side of adapter requests: compressed adapters are looked up, plain ones loaded as vLLM loads them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.manager import JDLoRAModelManager
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.step_requests import StepRequests

logger = logging.getLogger("vllm.jdlora")


class JDWorkerLoRAManager(LRUCacheWorkerLoRAManager):
    """All of a step's work is proportional to the adapters in the batch, never to the adapters that are known."""

    _manager_cls = JDLoRAModelManager
    _adapter_manager: JDLoRAModelManager

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._unreadable: dict[str, str] = {}

    def set_active_requests(self, step: StepRequests) -> None:
        """Activate a step's adapters and plan the step; next to nothing while the same requests go on decoding."""
        manager = self._adapter_manager
        if not manager.is_planned(step):
            self._apply_adapters(step.adapters)
            manager.plan(step)

    def _apply_adapters(self, lora_requests: Collection[LoRARequest]) -> None:
        # The scheduler bounds how many adapters of each kind a batch holds; vLLM's own check counts base slots.
        manager = self._adapter_manager
        others = manager.touch_resident(lora_requests)
        failed = {}
        for request in {r.lora_int_id: r for r in others}.values():
            try:
                self._add(request, announced=False)
            except Exception as error:
                # What a device says is about more than one adapter.
                if isinstance(error, RuntimeError) or not manager.runs_alone:
                    raise
                failed[request.lora_int_id] = str(error)
                manager.compressed.unbind(request.lora_int_id)  # it may have been bound when its Σ was evicted
        for lora_id, problem in manager.bring_bases(lora_requests).items():
            if not manager.runs_alone:
                raise problem
            failed[lora_id] = str(problem)
        for request in lora_requests:
            if told := failed.get(request.lora_int_id):
                self._unreadable.setdefault(request.lora_path, told)
                logger.error("Requests of adapter %s end with an error: %s", request.lora_name, told)
        manager.note_failed(failed)
        if others:
            manager.compressed.forget_unannounced(lora_requests)

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """vLLM's RPC ``add_lora``."""
        self._adapter_manager.compressed.announce(lora_request.lora_int_id)
        return self._add(lora_request, announced=True)

    def _add(self, request: LoRARequest, *, announced: bool) -> bool:
        if request.lora_path in self._unreadable:
            # The prefix cache holds blocks that the base model wrote in its place.
            raise JDLoRAError(
                f"adapter {request.lora_name!r} could not be read when a step wanted it: "
                f"{self._unreadable[request.lora_path]}; restart the server to try again"
            )
        manager, compressed = self._adapter_manager, self._adapter_manager.compressed
        lora_id = request.lora_int_id
        if compressed.directory.is_bound(request):
            compressed.activate(lora_id)
            return False
        path = AdapterPath.parse(request.lora_path)
        if path is not None:
            compressed.bind(request, path, announced=announced)
            return True
        compressed.unbind(lora_id)  # it may have been a compressed adapter's
        if manager.is_registered(lora_id) and not request.load_inplace:
            manager.activate_adapter(lora_id)
            return False
        return super().add_adapter(request)

    def _load_adapter(self, lora_request: LoRARequest) -> Any:
        lora = super()._load_adapter(lora_request)
        if unserved := self._adapter_manager.unwrapped_targets(lora):
            kinds = sorted({name.rpartition(".")[2] for name in unserved})
            # vLLM would serve the adapter without these weights.
            raise JDLoRAError(
                f"adapter {lora_request.lora_name!r} changes {', '.join(kinds)}, which this server does not adapt: "
                f"start it with --lora-target-modules that name them as well"
            )
        return lora

    def add_dummy_lora(self, lora_request: LoRARequest, rank: int) -> bool:
        return self._adapter_manager.add_dummy(lora_request.lora_int_id)
