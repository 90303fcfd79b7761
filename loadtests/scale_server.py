"""A running server of the scale benchmark: requests to it, its worker's methods, and what it lists."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import httpx
from metrics_page import fetch_page
from scale_report import Listing
from scale_traffic import Ask, closed_loop

from vllm_jdlora.demo.server import Server


@dataclass
class Running:
    """A server that is up, and which of its adapters were asked for."""

    server: Server
    names: list[str]
    asked: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._http = httpx.Client(base_url=self.server.url, timeout=60, trust_env=False)

    def call(self, method: str) -> Any:
        """A method of its worker."""
        response = self._http.post("/collective_rpc", json={"method": method}).raise_for_status()
        return response.json()["results"][0] if response.content else None

    def listing(self, times: int = 5) -> Listing:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            response = self._http.get("/v1/models").raise_for_status()
            seconds.append(time.perf_counter() - start)
        return Listing(seconds, len(response.json()["data"]), len(response.content))

    def metrics_lines(self) -> int:
        return len(fetch_page(self.server.url).splitlines())

    async def ask(
        self, session: aiohttp.ClientSession, asks: list[Ask], concurrency: int, answered: Callable[[], None]
    ) -> tuple[list[tuple[Ask, float]], float]:
        """(request, seconds to its first token), and seconds of all."""
        self.asked.update(ask.model for ask in asks)
        done, seconds = await closed_loop(session, self.server.url, asks, concurrency, answered)
        return [(ask, timing.ttft or 0.0) for ask, timing in done], seconds
