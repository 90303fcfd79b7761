"""Another revision of the collection under traffic: checked, given to the workers, and then its names at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.schema import AdapterEntry, PlainEntry
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_copies import AdapterCopies
from vllm_jdlora.serving.collection_revisions import KEPT
from vllm_jdlora.serving.event_log import event
from vllm_jdlora.serving.options import AdapterPath, absolute, adapter_paths
from vllm_jdlora.serving.placement import check_plain, error_limit
from vllm_jdlora.serving.runtime_adapters import Loaded, RuntimeAdapters

DRAIN_SECONDS = 300.0
"""How long requests of compressed adapters may take to end before other bases are loaded."""

LOAD_RPC = "jdlora_load_collection"
"""The method of :class:`~vllm_jdlora.serving.worker.JDWorker` that serves another revision from the next step on."""


@dataclass(frozen=True)
class Swapped:
    """What a reload did; numbers of adapters, and how long requests of compressed adapters were held back."""

    revision: str
    added: int = 0
    removed: int = 0
    changed: int = 0
    same_bases: bool = True
    paused_seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class _Plan:
    """Names after the swap, where adapters that came at run time go, and files of the arrivals folder that it uses."""

    names: dict[str, LoRARequest] = field(default_factory=dict)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    added: int = 0
    changed: int = 0
    removed: int = 0

    def use(self, copies: AdapterCopies, *files: Path) -> None:
        copies.use(*files)
        self.files += files


class CollectionSwap:
    """Brings revisions of a collection to a running server.

    With the same bases nothing waits: workers serve both revisions until the old one's requests have ended. So it is
    with other bases for which there are base slots beside those that are served. Without them requests of compressed
    adapters wait at the API server, before they have chosen an adapter's content, until those under way have ended and
    the new bases are loaded; the base model and plain adapters go on.
    """

    def __init__(self, runtime: RuntimeAdapters):
        self._runtime = runtime
        # Oldest first; workers serve the last of them all, however long ago they were replaced.
        self._revisions = [runtime.collection.manifest.revision]

    async def load(self, path: str | None = None, *, drain_seconds: float = DRAIN_SECONDS) -> Swapped:
        """Serve the collection in `path` (default: the folder that is served, as it is on disk now).

        Raises:
            JDLoRAError: it cannot be served in this server, or requests under way took too long. The old revision is
                served then as before.
        """
        started, before = time.monotonic(), self._runtime.collection
        told = {"path": path or before.path}
        try:
            done = await self._load(path, drain_seconds)
        except JDLoRAError:
            event("reload", **told, result="refused", seconds=time.monotonic() - started)
            raise
        result = "unchanged" if done.revision == before.manifest.revision else "served"
        counts = {name: getattr(done, name) for name in ("added", "changed", "removed", "paused_seconds")}
        bases = "kept" if done.same_bases else "replaced"
        told |= {"result": result, "revision": done.revision, "bases": bases}
        event("reload", **told, **counts, seconds=time.monotonic() - started)
        return done

    async def _load(self, path: str | None, drain_seconds: float) -> Swapped:
        runtime = self._runtime
        async with runtime.changing:
            old = runtime.collection
            new = await asyncio.to_thread(_checked, absolute(path) if path else str(old.path), runtime.max_error)
            if new.manifest.revision == old.manifest.revision:
                return Swapped(old.manifest.revision)
            same = new.manifest.shares_bases_with(old.manifest)
            plan = await asyncio.to_thread(self._planned, old, new, same)
            try:
                paused = await self._hand_over(new, plan, same, drain_seconds)
            except BaseException as error:
                runtime.copies.release(*plan.files)
                if isinstance(error, JDLoRAError) or not isinstance(error, Exception):
                    raise
                raise JDLoRAError(
                    f"{new.path}: cannot be served in this server ({error}); revision {old.manifest.revision} goes on"
                ) from error
        return Swapped(new.manifest.revision, plan.added, plan.removed, plan.changed, same, round(paused, 3))

    async def _hand_over(self, new: Collection, plan: _Plan, same_bases: bool, drain_seconds: float) -> float:
        """Give the collection to the workers and the names to it; seconds that requests were held back."""
        running, beside = self._runtime.running, not same_bases and self._fits_beside(new)
        if beside:
            await running.other_bases_unused(drain_seconds)
        if same_bases or beside:
            await self._load_in_workers(new, beside)
            self._swap(new, plan, same_bases)
            if beside:
                running.bases_changed(others_stay=True)
            return 0.0
        started = time.monotonic()
        async with running.held_back(drain_seconds):
            await self._load_in_workers(new, beside)
            self._swap(new, plan, same_bases)
            running.bases_changed(others_stay=False)
        return time.monotonic() - started

    def _fits_beside(self, new: Collection) -> bool:
        """Whether the workers can have the bases of both, and the Σ of both in one buffer."""
        before, after = self._runtime.collection.manifest, new.manifest
        same_form = all(getattr(before, name) == getattr(after, name) for name in ("slices", "rank", "method"))
        return same_form and before.clusters + after.clusters <= self._runtime.base_slots

    async def _load_in_workers(self, new: Collection, beside: bool) -> None:
        args = (str(new.path), new.manifest.revision, beside)
        await self._runtime.engine.collective_rpc(LOAD_RPC, args=args)

    # --- in a thread ----------------------------------------------------------------------------------------------

    def _planned(self, old: Collection, new: Collection, same_bases: bool) -> _Plan:
        runtime, plan = self._runtime, _Plan()
        with runtime.copies.kept():
            try:
                own = self._plan_collection(plan, old, new, same_bases)
                for name, request in runtime.names.items():
                    if name in plan.names or name in own:
                        continue
                    loaded = runtime.loaded.get(name)
                    plan.names[name] = request
                    if loaded is not None and not same_bases:
                        self._plan_arrival(plan, request, loaded, new)
            except BaseException:
                runtime.copies.release(*plan.files)
                raise
        return plan

    def _plan_collection(self, plan: _Plan, old: Collection, new: Collection, same_bases: bool) -> set[str]:
        """The names that the old collection gave and that still are its own."""
        runtime, before, after = self._runtime, _entries(old), _entries(new)
        own = {name for name in before if name in runtime.names and name not in runtime.loaded}
        for name, path in self._paths(new):
            known, entry = runtime.names.get(name), after[name]
            if runtime.models.is_base_model(name) or (known and name not in own and name not in runtime.loaded):
                raise JDLoRAError(
                    f"{new.path} has an adapter named {name!r} and this server another model of that name: rename it"
                )
            if name in own and before[name] == entry and self._goes_on(runtime.names[name], same_bases):
                plan.names[name] = runtime.names[name]
                continue
            plan.names[name] = self._fresh(name, path)
            if isinstance(entry, PlainEntry):
                plan.use(runtime.copies, Path(path))
            if known is None:
                plan.added += 1
            elif name in runtime.loaded or _content(before[name]) != _content(entry):
                plan.changed += 1
        plan.removed = len(own - after.keys())
        return own

    def _goes_on(self, request: LoRARequest, same_bases: bool) -> bool:
        """Whether an adapter of unchanged content keeps its path, and with it its blocks in the prefix cache."""
        path = AdapterPath.parse(request.lora_path)
        return path is None or (same_bases and path.revision in self._revisions[-KEPT:])

    def _plan_arrival(self, plan: _Plan, request: LoRARequest, loaded: Loaded, new: Collection) -> None:
        """Project an adapter that came at run time on other bases."""
        placed = self._runtime.take_in(loaded.adapter, new, error_limit(new, self._runtime.max_error))
        plan.loaded[request.lora_name] = placed
        plan.files += placed.files
        if placed.path != request.lora_path:
            plan.names[request.lora_name] = self._fresh(request.lora_name, placed.path)

    def _fresh(self, name: str, path: str) -> LoRARequest:
        return LoRARequest(name, self._runtime.models.lora_id_counter.inc(1), path)

    def _paths(self, new: Collection) -> Iterable[tuple[str, str]]:
        # A plain adapter that a worker cannot load would end the engine with the first request for it.
        compressed = len(new.manifest.adapters)
        paths = adapter_paths(new)
        yield from paths[:compressed]
        for (name, path), entry in zip(paths[compressed:], new.manifest.plain, strict=True):
            check_plain(read_adapter(Path(path), name), self._runtime.engine.vllm_config.lora_config)
            yield name, str(self._runtime.copies.link(Path(path), entry.sha256))

    # --- in the event loop, without a pause -----------------------------------------------------------------------

    def _swap(self, new: Collection, plan: _Plan, same_bases: bool) -> None:
        runtime = self._runtime
        for name, request in list(runtime.names.items()):
            if plan.names.get(name) is not request:
                runtime.drop(name, request)
        for name, placed in plan.loaded.items():
            if kept := runtime.loaded.get(name):  # its request is the same, and the plan counts its files anew
                runtime.copies.release(*kept.files)
            runtime.loaded[name] = placed
        runtime.names.become(plan.names)
        revision = new.manifest.revision
        earlier = [r for r in self._revisions if same_bases and r != revision]
        self._revisions = [*earlier[-KEPT:], revision]
        runtime.collection = new
        runtime.limit = error_limit(new, runtime.max_error)


def _checked(path: str, max_error: float | None) -> Collection:
    collection = Collection.open(path, verify=True)
    above = [a.name for a in collection.manifest.adapters if max_error is not None and a.relative_error > max_error]
    if above:
        raise JDLoRAError(
            f"{path}: {len(above)} adapters, {above[0]!r} first, have a relative error above --jd-max-error "
            f"{max_error:g}: build it with `jdlora compress --max-error {max_error:g}`"
        )
    return collection


def _entries(collection: Collection) -> dict[str, AdapterEntry | PlainEntry]:
    manifest = collection.manifest
    compressed: dict[str, AdapterEntry | PlainEntry] = {entry.name: entry for entry in manifest.adapters}
    return compressed | {entry.name: entry for entry in manifest.plain}


def _content(entry: AdapterEntry | PlainEntry) -> tuple[type, str, float | None]:
    """What makes an adapter answer as it does, as far as a manifest says it."""
    return type(entry), entry.sha256, entry.relative_error
