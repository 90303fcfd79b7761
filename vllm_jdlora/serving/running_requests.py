"""Which adapters the requests under way use: an old one is kept until the last of them has ended.

Every request goes from the API server to the engine through ``generate`` or ``encode``. There its adapter is looked at
once more: between the lookup of a model's name and the engine lie the rendering of a prompt and whatever a client's
tools take, and the name may have got another adapter meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_names import AdapterNames
from vllm_jdlora.serving.options import PATH_SCHEME

logger = logging.getLogger("vllm.jdlora")

GRACE_SECONDS = 10.0
"""How long an adapter that was replaced is still served to requests that looked it up before, since its last use."""


class RunningRequests:
    """Counts requests by the id of their adapter, and holds them back while all bases change.

    Args:
        engine_client: vLLM's ``AsyncLLM``.
        names: what each name means now.
    """

    def __init__(self, engine_client: Any, names: AdapterNames, *, grace_seconds: float = GRACE_SECONDS):
        self._engine = engine_client
        self._names = names
        self._grace = grace_seconds
        self._running: Counter[int] = Counter()
        self._compressed = 0
        self._in_engine: set[int] = set()
        self._retired: dict[int, _Retired] = {}
        self._over: dict[int, _Retired] = {}
        self._on_other_bases: set[int] = set()
        self._an_adapter_left = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._drained = asyncio.Event()
        self._drained.set()
        self._sweeper: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """From now on see every request; on the instance, so that nothing of vLLM changes but this engine's client."""
        self._engine.generate = self._watched(self._engine.generate)
        self._engine.encode = self._watched(self._engine.encode)

    def sent(self, request: LoRARequest) -> None:
        """The engine knows the adapter by a call of its own."""
        self._in_engine.add(request.lora_int_id)

    def retire(self, request: LoRARequest, release: Callable[[], None]) -> None:
        """An adapter whose name is gone, or means another one: have it forgotten once nobody uses it.

        release: called when the engine has forgotten it.
        """
        now = asyncio.get_running_loop().time()
        self._retired[request.lora_int_id] = _Retired(request, release, now)
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep(), name="jdlora-retired-adapters")

    def bases_changed(self, *, others_stay: bool) -> None:
        """Other bases are served from now on: compressed adapters that are retired by now are on those before.

        others_stay: the engine has both. Else nobody uses such an adapter, and nobody may any more.
        """
        retired = [lora_id for lora_id, r in self._retired.items() if r.request.lora_path.startswith(PATH_SCHEME)]
        if others_stay:
            self._on_other_bases.update(retired)
            return
        self._on_other_bases.clear()
        for lora_id in retired:
            self._over[lora_id] = self._retired.pop(lora_id)

    async def other_bases_unused(self, timeout: float) -> None:
        """Wait until no request uses other bases than the newest ones. Nobody is held back for it.

        Requests that have only looked up an adapter on others get what its name means now.

        Raises:
            JDLoRAError: requests under way took longer than `timeout` seconds.
        """
        others = {lora_id: self._retired[lora_id] for lora_id in self._on_other_bases & self._retired.keys()}
        for retired in others.values():
            retired.servable = False

        async def left() -> None:
            while self._running.keys() & others.keys():
                self._an_adapter_left.clear()
                await self._an_adapter_left.wait()

        try:
            await asyncio.wait_for(left(), timeout)
        except BaseException as error:
            for retired in others.values():
                retired.servable = True
            if not isinstance(error, asyncio.TimeoutError):
                raise
            running = sum(self._running[lora_id] for lora_id in others)
            raise JDLoRAError(
                f"{running} requests were still running after {timeout:g} s on bases that were replaced before: "
                "nothing was changed; try again later"
            ) from None
        self._on_other_bases.clear()
        for lora_id in others.keys() & self._retired.keys():
            self._over[lora_id] = self._retired.pop(lora_id)

    @asynccontextmanager
    async def held_back(self, timeout: float) -> AsyncIterator[None]:
        """No request with a compressed adapter runs inside the block; those that come wait, and go on after it.

        Requests that wait are not in the engine yet, so they get the bases that are there when they go on.

        Raises:
            JDLoRAError: those under way took longer than `timeout` seconds.
        """
        self._open.clear()
        try:
            try:
                await asyncio.wait_for(self._drained.wait(), timeout)
            except asyncio.TimeoutError:
                raise JDLoRAError(
                    f"{self._compressed} requests of compressed adapters were still running after {timeout:g} s: "
                    "nothing was changed; try again when there is less to do"
                ) from None
            yield
        finally:
            self._open.set()

    # --- requests -------------------------------------------------------------------------------------------------

    def _watched(self, original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
        def call(*args: Any, lora_request: LoRARequest | None = None, **kwargs: Any) -> AsyncGenerator[Any, None]:
            if lora_request is None:
                return original(*args, **kwargs)
            return self._counted(original, lora_request, *args, **kwargs)

        return call

    async def _counted(
        self, original: Callable[..., AsyncGenerator[Any, None]], asked: LoRARequest, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        while True:
            request = self._servable(asked)
            compressed = request.lora_path.startswith(PATH_SCHEME)
            if not compressed or self._open.is_set():
                break
            await self._open.wait()
        lora_id = request.lora_int_id
        self._in_engine.add(lora_id)
        self._running[lora_id] += 1
        self._compressed += compressed
        if compressed:
            self._drained.clear()
        try:
            async with aclosing(original(*args, lora_request=request, **kwargs)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._ended(lora_id, compressed)

    def _servable(self, asked: LoRARequest) -> LoRARequest:
        """What a request asks for as long as it is kept, else what the name means now."""
        current, retired = self._names.get(asked.lora_name), self._retired.get(asked.lora_int_id)
        if current is asked or (retired is not None and retired.servable):
            return asked
        if current is None:
            raise VLLMNotFoundError(f"The model `{asked.lora_name}` does not exist.")
        return current

    def _ended(self, lora_id: int, compressed: bool) -> None:
        self._running[lora_id] -= 1
        if not self._running[lora_id]:
            del self._running[lora_id]
            self._an_adapter_left.set()
        if lora_id in self._retired:
            self._retired[lora_id].unused_since = asyncio.get_running_loop().time()
        self._compressed -= compressed
        if not self._compressed:
            self._drained.set()

    # --- adapters that are replaced -------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while self._retired or self._over:
            while self._over:
                await self._forget(self._over.popitem()[1])
            await asyncio.sleep(self._grace / 4)
            oldest = loop.time() - self._grace
            for lora_id, retired in list(self._retired.items()):
                if lora_id not in self._running and retired.unused_since <= oldest:
                    self._over[lora_id] = self._retired.pop(lora_id)

    async def _forget(self, retired: _Retired) -> None:
        lora_id = retired.request.lora_int_id
        try:
            if lora_id in self._in_engine:
                self._in_engine.discard(lora_id)
                await self._engine.remove_lora(lora_id)
        except Exception:
            # A dead engine ends the server by itself.
            logger.exception("The engine could not forget adapter id %d", lora_id)
        finally:
            retired.release()


@dataclass
class _Retired:
    request: LoRARequest
    release: Callable[[], None]
    unused_since: float
    servable: bool = True
