"""What the soak test sees of the server from outside: memory of its processes, and its Prometheus page."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import psutil
from metrics_page import Counters, read_counters, requests_running, requests_waiting
from process_tree import Memory, memory_by_process


@dataclass(frozen=True)
class Seen:
    """At one moment (``time.perf_counter()``).

    Attributes:
        own: bytes of memory of the server's processes that no file lies behind; by process in `own_of`.
        resident: with mapped files; pages that processes share are counted once.
        running, waiting: requests.
        client: resident bytes of this process.
    """

    at: float
    own: int
    resident: int
    running: float
    waiting: float
    client: int
    own_of: dict[str, int]


@dataclass
class Watch:
    """Looks at a server."""

    session: aiohttp.ClientSession
    url: str
    root: psutil.Process
    seen: list[Seen] = field(default_factory=list)

    async def counters(self) -> Counters:
        return read_counters(await self._page())

    async def look(self) -> Seen:
        text = await self._page()
        memory = await asyncio.to_thread(memory_by_process, self.root)
        seen = Seen(
            at=time.perf_counter(),
            own=_sum(memory, "anonymous") + _sum(memory, "shared"),
            resident=_sum(memory, "share"),
            running=requests_running(text),
            waiting=requests_waiting(text),
            client=psutil.Process().memory_info().rss,
            own_of={title: m.anonymous + m.shared for title, m in memory.items()},
        )
        self.seen.append(seen)
        return seen

    async def keep_looking(self, every: float, over: Callable[[], bool]) -> None:
        """Until `over`. A server that does not answer is no reason to stop: requests find that out."""
        while not over():
            with contextlib.suppress(aiohttp.ClientError, OSError, asyncio.TimeoutError, psutil.Error):
                await self.look()
            await asyncio.sleep(every)

    async def until_idle(self, seconds: float) -> bool:
        """Whether the engine holds no request any more within so many seconds."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            seen = await self.look()
            if not seen.running and not seen.waiting:
                return True
            await asyncio.sleep(0.5)
        return False

    async def _page(self) -> str:
        async with self.session.get(f"{self.url}/metrics") as response:
            return await response.text()


def _sum(memory: dict[str, Memory], kind: str) -> int:
    return sum(getattr(m, kind) for m in memory.values())
