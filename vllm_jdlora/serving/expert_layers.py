"""Experts are built as without LoRA: no adapter changes them here.

Where LoRA is on vLLM takes expert kernels that adapters could change. They are slower ones, and on CPU there are none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def built_without_lora() -> Iterator[None]:
    """For a model that is loaded inside."""
    from vllm.model_executor.layers.fused_moe import layer

    stock = layer.FusedMoEConfig

    @functools.wraps(stock)
    def without_lora(*args: Any, **settings: Any) -> Any:
        return stock(*args, **{**settings, "is_lora_enabled": False})

    layer.FusedMoEConfig = without_lora
    try:
        yield
    finally:
        layer.FusedMoEConfig = stock
