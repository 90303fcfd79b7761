"""What each model name of an API server means: its table of adapters, and the collection's entered in one go."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_copies import AdapterCopies
from vllm_jdlora.serving.adapter_metrics import set_known
from vllm_jdlora.serving.options import PATH_SCHEME, ServingOptions
from vllm_jdlora.serving.requests import lora_requests
from vllm_jdlora.serving.starting_collection import checked

logger = logging.getLogger("vllm.jdlora")


class AdapterNames(dict[str, LoRARequest]):
    """Name → request, in the place of vLLM's ``lora_requests``; ``version`` counts its changes."""

    def __init__(self, names: Mapping[str, LoRARequest]):
        super().__init__(names)
        self.version = 0
        self._compressed = sum(map(_is_compressed, names.values()))
        self._changed(0)

    def __setitem__(self, name: str, request: LoRARequest) -> None:
        before = self.get(name)
        super().__setitem__(name, request)
        self._changed(_is_compressed(request) - (before is not None and _is_compressed(before)))

    def __delitem__(self, name: str) -> None:
        before = self[name]
        super().__delitem__(name)
        self._changed(-_is_compressed(before))

    def become(self, names: Mapping[str, LoRARequest]) -> None:
        """All names at once: no request sees a part of the change."""
        self.clear()
        self.update(names)
        self._changed(sum(map(_is_compressed, names.values())) - self._compressed)

    def _changed(self, more_compressed: int) -> None:
        self.version += 1
        self._compressed += more_compressed
        set_known(self._compressed, len(self) - self._compressed)


def _is_compressed(request: LoRARequest) -> bool:
    return request.lora_path.startswith(PATH_SCHEME)


class LocksInUse:
    """A lock for each name, gone when nobody holds it: names come from clients, so they must not add up."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def __len__(self) -> int:
        return len(self._locks)


def enter_collection(models: Any) -> None:
    """Give vLLM's ``OpenAIServingModels`` the adapters of the served collection, without an RPC for each.

    Ids count up from 1 in the collection's order, so that all API servers of one engine agree; ids of adapters that
    are given by hand follow. An adapter reaches the engine with the first request for it.

    Raises:
        JDLoRAError: the collection was replaced since the server's settings were made or its content is damaged, or a
            name is the base model's.
    """
    options = ServingOptions.from_additional_config(models.engine_client.vllm_config.additional_config)
    if options is None:
        return
    started = time.monotonic()
    collection = checked(options.collection)
    if collection.manifest.revision != options.revision:
        raise JDLoRAError(f"{options.collection}: was replaced while the server started; start it again")
    requests = lora_requests(collection)
    for base in models.base_model_paths:
        if base.name in requests:
            raise JDLoRAError(
                f"{options.collection} has an adapter that is named {base.name!r}, like the base model: give the base "
                "model another name with --served-model-name"
            )
    if options.arrivals:
        copies = AdapterCopies(Path(options.arrivals))
        for entry in collection.manifest.plain:
            request = requests[entry.name]
            request.lora_path = str(copies.link(Path(request.lora_path), entry.sha256))
    models.lora_requests = AdapterNames(requests)
    models.lora_resolver_lock = LocksInUse()
    models.lora_id_counter.inc(len(requests))
    logger.info(
        "%d adapters of %s are known by name (%.2f s)", len(requests), collection.path, time.monotonic() - started
    )
