"""vLLM's own ``OpenAIServingModels`` over an engine without a model: it answers with the content of an adapter.

What the workers would look up is looked up in each step, from the same files, and what they could not find is an error.
So a test sees which content answered, and whether anything was taken away too early.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.lora.request import LoRARequest

from vllm_jdlora.adapter import content_digest
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.arrival_file import read_arrival
from vllm_jdlora.serving.adapter_names import enter_collection
from vllm_jdlora.serving.collection_revisions import KEPT
from vllm_jdlora.serving.options import AdapterPath, ServingOptions
from vllm_jdlora.serving.running_requests import RunningRequests
from vllm_jdlora.serving.runtime_adapters import RuntimeAdapters

GRACE = 0.05


def content_of(collection: Collection, name: str) -> str:
    """What the engine answers for a compressed adapter of a collection."""
    return hashlib.sha256(collection.sigma(collection.index_of(name)).float().numpy().tobytes()).hexdigest()


class FakeEngine:
    """Attributes:
    served: revision → collection, of those that a worker keeps.
    bases: revision → manifest whose bases its arrivals are on, of all bases that are loaded.
    known: id → path, of adapters that the engine was told of or has met.
    """

    def __init__(
        self, collection: Collection, arrivals: Path, *, max_lora_rank: int = 16, base_slots: int | None = None
    ):
        self.errored = False
        self.model_config = SimpleNamespace(max_model_len=256, model="tiny")
        self.renderer = self.input_processor = None
        options = ServingOptions(
            str(collection.path), collection.manifest.revision, arrivals=str(arrivals), base_slots=base_slots
        )
        targets = sorted({part.name.rpartition(".")[2] for part in collection.manifest.slices})
        self.vllm_config = SimpleNamespace(
            additional_config=options.put_into({}),
            lora_config=SimpleNamespace(target_modules=targets, max_lora_rank=max_lora_rank),
        )
        self.arrivals = arrivals
        self.newest = collection
        collection.sigma(0)  # as workers do: files are mapped before they may be replaced
        self.served = {collection.manifest.revision: collection}
        self.bases = {collection.manifest.revision: collection.manifest}
        self.known: dict[int, str] = {}
        self.removed: list[int] = []
        self.calls: list[tuple] = []
        self.refuse: str | None = None

    async def add_lora(self, request: LoRARequest) -> bool:
        self.calls.append(("add_lora", request.lora_name))
        await asyncio.sleep(0)
        if self.refuse:
            raise RuntimeError(self.refuse)
        self._content(request)
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.removed.append(lora_id)
        return self.known.pop(lora_id, None) is not None

    async def collective_rpc(self, method: str, timeout=None, args=(), kwargs=None):
        self.calls.append((method, *args))
        await asyncio.sleep(0)
        if self.refuse:
            raise RuntimeError(self.refuse)
        path, revision, beside = args
        new = Collection.open(path, verify=False)
        assert new.manifest.revision == revision
        kept = self.bases[self.newest.manifest.revision]
        if not new.manifest.shares_bases_with(kept):
            # Beside the newest bases there is room for one other collection's.
            self.bases = {r: m for r, m in self.bases.items() if m is kept} if beside else {}
            self.served = {r: c for r, c in self.served.items() if r in self.bases}
            kept = new.manifest
        new.sigma(0)
        self.served.pop(revision, None)
        self.served[revision] = self.newest = new
        self.bases[revision] = kept
        for old in [*self.served][: -KEPT - 1]:
            del self.served[old]

    async def generate(
        self, steps: int, step: asyncio.Event, request_id: str, *, lora_request: LoRARequest | None = None
    ) -> AsyncIterator[str | None]:
        for _ in range(steps):
            yield None if lora_request is None else self._content(lora_request)
            await step.wait()

    async def encode(self, *args, **kwargs) -> AsyncIterator[str | None]:
        async for output in self.generate(*args, **kwargs):
            yield output

    def _content(self, request: LoRARequest) -> str:
        assert self.known.setdefault(request.lora_int_id, request.lora_path) == request.lora_path, "one id, two paths"
        path = AdapterPath.parse(request.lora_path)
        if path is None:
            return content_digest(Path(request.lora_path))
        if not path.arrival:
            return content_of(self.served[path.revision], path.name)
        sigma = read_arrival(self.arrivals, path.arrival, self.bases[path.revision])
        return hashlib.sha256(sigma.float().numpy().tobytes()).hexdigest()


class FakeServer:
    """The API server's side as it is set up for real: models, running requests, adapters that come and go."""

    def __init__(self, collection: Collection, arrivals: Path, *, directory: str = "", grace: float = GRACE, **options):
        self.engine = FakeEngine(collection, arrivals, **options)
        self.models = OpenAIServingModels(self.engine, [BaseModelPath("base", "/models/base")])
        enter_collection(self.models)
        self.names = self.models.lora_requests
        self.running = RunningRequests(self.engine, self.names, grace_seconds=grace)
        self.running.watch()
        options = ServingOptions.from_additional_config(self.engine.vllm_config.additional_config)
        self.runtime = RuntimeAdapters(self.models, options, self.running, directory)
        self.runtime.take_over()

    def start(self, name: str, steps: int = 2) -> Answer:
        """A request whose name is looked up now."""
        return Answer(self.engine, steps, self.names[name])

    async def ask(self, name: str) -> str:
        answer = self.start(name, steps=1)
        answer.go()
        return await answer.content()

    def files(self) -> set[str]:
        root = self.engine.arrivals
        return {str(p.relative_to(root)) for p in (*root.glob("*.safetensors"), *root.glob("adapters/*"))}


class Answer:
    """A request on its way: nothing happens before `begin`, and no second step before `go`."""

    def __init__(self, engine: FakeEngine, steps: int, request: LoRARequest):
        self._step = asyncio.Event()
        self._outputs = engine.generate(steps, self._step, "id", lora_request=request)
        self._begun: list[str] = []

    async def begin(self) -> None:
        self._begun.append(await anext(self._outputs))

    def go(self) -> None:
        self._step.set()

    async def content(self) -> str:
        """The one content that all its steps were computed with."""
        found = {*self._begun, *[output async for output in self._outputs]}
        assert len(found) == 1
        return found.pop()

    async def abort(self) -> None:
        await self._outputs.aclose()
