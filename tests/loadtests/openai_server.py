"""A small OpenAI-compatible server in this process, whose every answer the tests decide."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text}]}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


async def streamed(request: web.Request, *events: bytes, pause: float = 0.0) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for data in events:
        await response.write(data)
        if pause:
            await asyncio.sleep(pause)
    return response


async def every_token(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As many tokens as were asked for, one a piece."""
    tokens = body["max_tokens"]
    events = [event(piece(f"t{i} ")) for i in range(tokens)]
    return await streamed(request, *events, event(usage(len(body.get("prompt", [])), tokens)), event(b"[DONE]"))


@asynccontextmanager
async def serving(
    answer: Answer = every_token,
    models: Sequence[str | dict] = (),
    more: Mapping[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] | None = None,
) -> AsyncIterator[tuple[str, list[dict]]]:
    """(url, bodies received so far) of a running server; `more`: path → what answers a GET of it."""
    bodies: list[dict] = []

    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body | {"path": request.path, "authorization": request.headers.get("Authorization")})
        return await answer(request, body)

    async def list_models(request: web.Request) -> web.Response:
        return web.json_response({"data": [m if isinstance(m, dict) else {"id": m} for m in models]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_get("/v1/models", list_models)
    for path, handler in (more or {}).items():
        app.router.add_get(path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        yield f"http://127.0.0.1:{port}", bodies
    finally:
        await runner.cleanup()
