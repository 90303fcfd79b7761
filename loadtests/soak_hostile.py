"""Requests that a server must refuse, and go on: malformed, oversized, for unknown models; and half sent ones.

Each kind has the HTTP status that is right for it. They are sent one after the other while normal traffic runs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from soak_adapters import BASE

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LOAD, UNLOAD, RELOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/reload_lora_collection"
LOAD_NO_FOLDER = "load: no such folder"
GONE = "gone"
"""The outcome of a request whose client closes the connection before it has sent all."""


@dataclass(frozen=True)
class HostileRequest:
    """One request: its kind, path and body, and the statuses that are right."""

    kind: str
    path: str
    body: bytes
    right: frozenset[int]
    half: bool = False


def hostile_requests(names: list[str], context: int, seed: int) -> itertools.chain[HostileRequest]:
    """All kinds in turn, without end; `context`: tokens of a prompt and its answer that the server takes."""
    draw = random.Random(seed)
    return itertools.chain.from_iterable(_one_of_each(draw, names, context) for _ in itertools.count())


def _one_of_each(draw: random.Random, names: list[str], context: int) -> list[HostileRequest]:
    model = draw.choice([BASE, *names])
    good: dict[str, Any] = {"model": model, "prompt": "Once upon a time", "max_tokens": 4}
    # A revision may be without this adapter, and a server looks for the model before it looks at the rest.
    bad = (400,) if model == BASE else (400, 404)

    def completion(kind: str, right: tuple[int, ...] = bad, **changes: Any) -> HostileRequest:
        return HostileRequest(kind, COMPLETIONS, json.dumps(good | changes).encode(), frozenset(right))

    def raw(kind: str, body: bytes, path: str = COMPLETIONS) -> HostileRequest:
        return HostileRequest(kind, path, body, frozenset(bad))

    def adapter_call(kind: str, path: str, right: tuple[int, ...], **body: Any) -> HostileRequest:
        return HostileRequest(kind, path, json.dumps(body).encode(), frozenset(right))

    whole = json.dumps(good).encode()
    found = [
        raw("malformed: cut off", whole[: draw.randrange(1, len(whole))]),
        raw("malformed: not JSON", draw.randbytes(200)),
        raw("malformed: no object", b"[1, 2, 3]"),
        raw("malformed: nested", b"[" * 100_000),
        raw("malformed: chat without messages", json.dumps({"model": model}).encode(), CHAT),
        completion("malformed: type", max_tokens="many"),
        completion("malformed: value", temperature=-1),
        completion("malformed: token id", prompt=[1, 10**9]),
        completion("oversized: prompt over the context", prompt=[7] * (context + draw.randint(1, context))),
        completion("oversized: answer over the context", max_tokens=8 * context),
        completion("oversized: text of 4 MB", prompt="word " * 800_000),
        completion("oversized: 200,000 tokens", prompt=[7] * 200_000),
        completion("unknown model", (404,), model=f"nobody-{draw.randrange(10**6)}"),
        completion("unknown model", (404,), model="../" * draw.randint(1, 40) + "x" * draw.randint(1, 2000)),
        HostileRequest("unknown path", "/v1/nothing", whole, frozenset({404})),
        adapter_call(LOAD_NO_FOLDER, LOAD, (400, 404), lora_name="nothing", lora_path="/no/such/folder"),
        adapter_call("load: not named", LOAD, (400, 422), lora_path="/no/such/folder"),
        adapter_call("load: name is taken", LOAD, (400,), lora_name=BASE, lora_path="/no/such/folder"),
        adapter_call("unload: unknown", UNLOAD, (400, 404), lora_name=f"nobody-{draw.randrange(10**6)}"),
        adapter_call("reload: no such collection", RELOAD, (400,), lora_collection="/no/such/folder"),
        HostileRequest("half a request", COMPLETIONS, whole[: len(whole) // 2], frozenset(), half=True),
    ]
    draw.shuffle(found)
    return found


@dataclass
class HostileClient:
    """Sends them, and counts what came back.

    Attributes:
        statuses: (kind, path, status) → how often; status `GONE` for half requests, ``error`` where no answer came.
        wrong: of those whose outcome was not the right one, at most 20, as text.
        slowest: kind → seconds of the slowest answer.
    """

    session: aiohttp.ClientSession
    url: str
    statuses: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    wrong_count: int = 0
    slowest: dict[str, float] = field(default_factory=dict)

    def count(self, kind: str) -> int:
        """How many of a kind were answered."""
        return sum(n for (k, _, status), n in self.statuses.items() if k == kind and status.isdigit())

    async def send(self, request: HostileRequest) -> None:
        sent = time.perf_counter()
        try:
            status, text = await (self._half(request) if request.half else self._whole(request))
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            status, text = "error", f"{type(error).__name__}: {error}"
        self.slowest[request.kind] = max(time.perf_counter() - sent, self.slowest.get(request.kind, 0.0))
        self.statuses[request.kind, request.path, status] += 1
        right = status == GONE if request.half else status.isdigit() and int(status) in request.right
        if not right:
            self.wrong_count += 1
            self.wrong = [*self.wrong, f"{request.kind}: {status} {text[:300]}"][:20]

    async def _whole(self, request: HostileRequest) -> tuple[str, str]:
        headers = {"Content-Type": "application/json"}
        limits = aiohttp.ClientTimeout(total=120)
        url = self.url + request.path
        async with self.session.post(url, data=request.body, headers=headers, timeout=limits) as response:
            return str(response.status), await response.text()

    async def _half(self, request: HostileRequest) -> tuple[str, str]:
        """Announces twice as many bytes as it sends, and closes the connection."""
        where = urlsplit(self.url)
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        head = f"POST {request.path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {2 * len(request.body)}\r\n\r\n".encode() + request.body)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        return GONE, ""


async def keep_sending(
    client: HostileClient, requests: itertools.chain[HostileRequest], pause: float, over: Callable[[], bool]
) -> None:
    """One request about every `pause` seconds, until `over`."""
    draw = random.Random(0)
    while not over():
        await client.send(next(requests))
        await asyncio.sleep(draw.uniform(0.5, 1.5) * pause)
