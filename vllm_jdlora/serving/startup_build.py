"""Build the collection when the server starts, once for each content: adapters → cached collection folder."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cache import cache_root
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress

logger = logging.getLogger("vllm.jdlora")

_LOG_SECONDS = 10.0
_RECIPE = 1
"""Part of the cache key; raised when the same adapters would be compressed in another way."""


def build_cached(given: list[tuple[str, str]], *, base_model: str | None, max_error: float | None) -> Collection:
    """The collection of these adapters, from the cache when their content was compressed before.

    Args:
        given: (name, PEFT folder) of each adapter.
        base_model: path or name of the served model, for the check that the adapters belong to it.
        max_error: adapters above this relative error stay plain.

    Raises:
        JDLoRAError: an adapter cannot be read or compressed; it is named.
    """
    adapters = [read_adapter(Path(path), name) for name, path in given]
    recipe = {
        "recipe": _RECIPE,
        "max_error": max_error,
        "adapters": sorted((a.name, a.sha256) for a in adapters),
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
    target = cache_root() / "collections" / key
    if target.is_dir():
        logger.info("Compressed collection of %d adapters found in %s", len(adapters), target)
        # Every byte is checked when the engine's settings are made, as for a collection that the user names.
        return Collection.open(target, verify=False)
    logger.info("Compressing %d adapters into %s", len(adapters), target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return compress(adapters, target, base_model=base_model, max_error=max_error, progress=_logged())


def _logged() -> Callable[[str, int, int], None]:
    """Progress as log lines, the form that a starting server has for it: the end of each stage, and every 10 s."""
    last = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _LOG_SECONDS:
            last = time.monotonic()
            logger.info("Compressing adapters: %s %d/%d", stage, done, total)

    return show
