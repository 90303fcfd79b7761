"""LoRA requests for offline use: ``LLM.generate(..., lora_request=lora_requests(collection)[name])``."""

from __future__ import annotations

from vllm.lora.request import LoRARequest

from vllm_jdlora.collection import Collection
from vllm_jdlora.serving.options import adapter_paths


def lora_requests(collection: Collection) -> dict[str, LoRARequest]:
    """One request for each adapter of a collection, compressed and plain, by name; ids count up from 1."""
    return {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(adapter_paths(collection))}
