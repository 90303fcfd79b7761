"""What changes in an API server's process: the collection's adapters are entered in one go, and found in O(1)."""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_jdlora_wrapped"


def wrap_api_server() -> None:
    """Wrap two methods of vLLM's serving classes, once for each process."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from vllm_jdlora.serving import touchpoints

    if getattr(OpenAIServingModels, _MARK, False):
        return
    touchpoints.check("api_server")
    setattr(OpenAIServingModels, _MARK, True)
    _wrap_init_static_loras(OpenAIServingModels)
    _wrap_default_adapters(BaseServing)


def _wrap_init_static_loras(serving_models: Any) -> None:
    original = serving_models.init_static_loras

    @functools.wraps(original)
    async def init_static_loras(self: Any) -> Any:
        from vllm_jdlora.serving.adapter_names import enter_collection

        enter_collection(self)
        return await original(self)

    serving_models.init_static_loras = init_static_loras


def _wrap_default_adapters(serving: Any) -> None:
    original = serving._get_active_default_mm_loras

    @functools.wraps(original)
    def _get_active_default_mm_loras(self: Any, request: Any) -> Any:
        # vLLM compares the request with every adapter's name, for each chat request to the base model.
        names = self.models.lora_requests
        found = [names[kind] for kind in self._get_message_types(request) if kind in names]
        return found[0] if len(found) == 1 else None

    serving._get_active_default_mm_loras = _get_active_default_mm_loras
