"""Adapters that come and go while the server runs: loaded, replaced, unloaded, or found in a folder by their name."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, check_adapter_name, read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.arrival_file import write_arrival
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE
from vllm_jdlora.serving.adapter_copies import AdapterCopies
from vllm_jdlora.serving.adapter_metrics import observe_load
from vllm_jdlora.serving.adapter_names import AdapterNames
from vllm_jdlora.serving.event_log import event
from vllm_jdlora.serving.options import AdapterPath, ServingOptions
from vllm_jdlora.serving.placement import Placement, check_plain, error_limit, place
from vllm_jdlora.serving.running_requests import RunningRequests
from vllm_jdlora.serving.starting_collection import open_once

logger = logging.getLogger("vllm.jdlora")


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter that came at run time: its copy, and where it is served.

    Attributes:
        path: what a request for it carries.
        files: of the arrivals folder; it is a user of each.
    """

    adapter: Adapter
    placement: Placement
    path: str
    files: tuple[Path, ...]


class RuntimeAdapters:
    """Takes the place of the load, unload and resolve methods of vLLM's ``OpenAIServingModels``.

    Attributes:
        changing: held while the names, the collection or an adapter's place change: one change at a time.
        loaded: adapters that came at run time, by name.
        collection: that is served now.
        base_slots: clusters whose bases the workers have room for.
    """

    def __init__(self, models: Any, options: ServingOptions, running: RunningRequests, directory: str = ""):
        self.models = models
        self.engine = models.engine_client
        self.names: AdapterNames = models.lora_requests
        self.running = running
        self.copies = AdapterCopies(Path(options.arrivals))
        self.collection = open_once(options.collection)
        self.loaded: dict[str, Loaded] = {}
        self.changing = asyncio.Lock()
        self.base_slots = options.base_slots or self.collection.manifest.clusters
        self.max_error = options.max_error
        self.limit = error_limit(self.collection, self.max_error)
        for entry in self.collection.manifest.plain:
            self.copies.use(Path(self.names[entry.name].lora_path))
        self._directory = Path(directory).resolve() if directory else None
        self._resolve_elsewhere = models.resolve_lora

    def take_over(self) -> None:
        """Be what the server's routes call; on the instance, so that nothing of vLLM changes but these models."""
        self.models.load_lora_adapter = self.load
        self.models.unload_lora_adapter = self.unload
        self.models.resolve_lora = self.resolve

    async def load(self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None) -> ErrorResponse | str:
        """Project a PEFT folder on the bases and serve it compressed, or as it is; ``POST /v1/load_lora_adapter``."""
        async with self.changing:
            refused = await self.models._check_load_lora_adapter_request(request)
            if refused is not None:
                return refused
            find = partial(_folder_of, request.lora_path)
            loaded = await self._load(request.lora_name, find, base_model_name, request.is_3d_lora_weight)
        if isinstance(loaded, ErrorResponse):
            return loaded
        return f"Success: LoRA adapter '{request.lora_name}' added: {loaded.placement.told}."

    async def unload(self, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        """Forget a name, and its adapter when the last request for it has ended; ``POST /v1/unload_lora_adapter``."""
        async with self.changing:
            refused = await self.models._check_unload_lora_adapter_request(request)
            if refused is not None:
                return refused
            name = request.lora_name
            self.drop(name, self.names[name])
            del self.names[name]
        event("adapter_unload", name=name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def resolve(self, name: str) -> LoRARequest | ErrorResponse:
        """The adapter of an unknown name: from the server's folder of adapters, else as vLLM's resolvers find it."""
        folder = self._in_directory(name)
        if folder is None and not self.models.lora_resolvers:
            return await self._resolve_elsewhere(name)  # a name that nobody knows must not wait
        async with self.changing:
            if folder is None:
                return await self._resolve_elsewhere(name)
            if name not in self.names:
                loaded = await self._load(name, lambda: folder)
                if isinstance(loaded, ErrorResponse):
                    return loaded
            return self.names[name]

    def drop(self, name: str, request: LoRARequest) -> None:
        """Retire what a name meant, with its files."""
        loaded = self.loaded.pop(name, None)
        files = (Path(request.lora_path),) if loaded is None else loaded.files
        self.running.retire(request, partial(self.copies.release, *files))

    def take_in(self, adapter: Adapter, collection: Collection, limit: float) -> Loaded:
        """Copy and place an adapter; nothing of it is served yet. For a thread: reads, computes and writes files.

        Raises:
            JDLoRAError: it does not fit the base model or changed meanwhile, or the disk refuses.
        """
        with self.copies.kept():
            copy = self.copies.copy(adapter)
            files = [copy.path]
            try:
                placement = place(collection, copy, limit)
                if placement.sigma is None:
                    check_plain(copy, self.engine.vllm_config.lora_config)
                    path = str(copy.path)
                else:
                    path, sigma_file = self._write_sigma(copy, placement, collection)
                    files.append(sigma_file)
            except JDLoRAError:
                self.copies.discard(copy.path)
                raise
            self.copies.use(*files)
        return Loaded(copy, placement, path, tuple(files))

    def _write_sigma(self, adapter: Adapter, placement: Placement, collection: Collection) -> tuple[str, Path]:
        """What a request for a compressed adapter carries, and the file with its Σ."""
        assert placement.sigma is not None
        assert placement.cluster is not None and placement.relative_error is not None
        manifest = collection.manifest
        digest = write_arrival(
            self.copies.folder,
            placement.sigma,
            manifest=manifest,
            cluster=placement.cluster,
            name=adapter.name,
            relative_error=placement.relative_error,
            source_sha256=adapter.sha256,
        )
        path = AdapterPath(manifest.revision, placement.cluster, adapter.name, digest)
        return str(path), self.copies.sigma_path(digest)

    async def _load(
        self, name: str, find: Callable[[], Path], base_model_name: str | None = None, is_3d: bool = False
    ) -> Loaded | ErrorResponse:
        started = time.monotonic()

        def refused(problem: Exception) -> ErrorResponse:
            observe_load(name, "refused", time.monotonic() - started)
            logger.warning("LoRA adapter %r was not loaded: %s", name, problem)
            return create_error_response(str(problem), err_type="InvalidUserInput")

        try:
            check_adapter_name(name)
            loaded = await asyncio.to_thread(self._read_and_take_in, name, find)
        except JDLoRAError as error:
            return refused(error)
        # Never the id of the adapter that it replaces: requests for both may be under way.
        request = LoRARequest(name, self.models.lora_id_counter.inc(1), loaded.path, is_3d_lora_weight=is_3d)
        if base_model_name is not None and self.models.is_base_model(base_model_name):
            request.base_model_name = base_model_name
        self.running.sent(request)
        try:
            await self.engine.add_lora(request)
        except BaseException as error:
            self.running.retire(request, partial(self.copies.release, *loaded.files))
            if not isinstance(error, Exception) or self.engine.errored:
                raise
            return refused(error)
        if name in self.names:
            self.drop(name, self.names[name])
        self.loaded[name] = loaded
        self.names[name] = request
        seconds, placement = time.monotonic() - started, loaded.placement
        observe_load(name, "plain" if placement.sigma is None else "compressed", seconds, placement.relative_error)
        return loaded

    def _read_and_take_in(self, name: str, find: Callable[[], Path]) -> Loaded:
        return self.take_in(read_adapter(find(), name), self.collection, self.limit)

    def _in_directory(self, name: str) -> Path | None:
        """The folder of that name in the server's folder of adapters: a name from a client never leads out of it."""
        if self._directory is None:
            return None
        try:
            check_adapter_name(name)
        except JDLoRAError:
            return None
        folder = self._directory / name
        files = [folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE]
        inside = all(f.exists() and self._directory in f.resolve().parents for f in files)
        return folder if inside else None


def _folder_of(path: str) -> Path:
    """A local folder, or that of a model hub's snapshot, as vLLM finds it."""
    try:
        folder = Path(get_adapter_absolute_path(path))
        if folder.is_dir():
            return folder
    except (OSError, ValueError, RuntimeError) as error:  # too long, NUL, or a home that is none
        raise JDLoRAError(f"{path[:200]!a} is not a path that can be used: {error}") from error
    raise JDLoRAError(f"{path[:1000]}: no such folder")
