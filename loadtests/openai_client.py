"""A streaming client for OpenAI-compatible servers that times every piece of an answer.

What is sent (`request_body`) and how an answer is read (`AnswerReader`) know no transport, so that clients that are not
asynchronous use them too. `stream_completion` is the asynchronous client. All times are seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat."""


@dataclass(frozen=True)
class Timing:
    """What came of one request.

    Attributes:
        model: the name that was asked for.
        started: when it was sent, by ``time.perf_counter()``.
        seconds: from then to the last byte, or to the error.
        pieces: when each piece of the answer came, after `started`. Servers send a token a piece unless the client or
            the server falls behind; then several tokens share one.
        prompt_tokens, output_tokens: as the server counts them. Where it does not, a piece counts as one token and the
            prompt as none.
        error: None, or its kind: ``refused`` (no connection), ``http NNN``, ``timeout``, ``disconnected`` (the server
            closed the connection), ``server`` (an error within the stream), ``malformed`` (not the protocol), ``cut``
            (the stream ended without its closing mark), ``empty`` (no piece at all).
        detail: what the server or the transport said of the error, at most 300 characters.
        left: the client closed the connection on purpose, after as many pieces or at the time that it was told.
        text: the answer, if it was asked to be kept.
        tokens, logprobs: of the answer, where the request asked for logprobs.
    """

    model: str
    started: float
    seconds: float
    pieces: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    detail: str = ""
    left: bool = False
    text: str = ""
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def ttft(self) -> float | None:
        """Time to the first token; None if there was none."""
        return self.pieces[0] if self.pieces else None

    @property
    def gaps(self) -> list[float]:
        """Times between one piece and the next."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def inter_token(self) -> float | None:
        """Mean time for each token after the first; None for answers of fewer than two tokens."""
        if len(self.pieces) < 2 or self.output_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.output_tokens - 1)

    def tokens_between(self, begin: float, end: float) -> float:
        """Output tokens that came in [begin, end) of ``time.perf_counter()``, evenly spread over the pieces."""
        if not self.pieces:
            return 0.0
        inside = sum(begin <= self.started + piece < end for piece in self.pieces)
        return inside * self.output_tokens / len(self.pieces)

    def as_json(self) -> dict[str, Any]:
        """For JSON; times in microseconds' precision, without what is empty."""
        record = asdict(self) | {
            "started": round(self.started, 6),
            "seconds": round(self.seconds, 6),
            "pieces": [round(piece, 6) for piece in self.pieces],
        }
        optional = ("error", "detail", "left", "text", "tokens", "logprobs")
        return {key: value for key, value in record.items() if value or key not in optional}


def request_body(model: str, prompt: Prompt, max_tokens: int, **options: Any) -> tuple[str, dict[str, Any]]:
    """(path, JSON body) of a streaming request with greedy decoding; `options` are added to the body."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    if isinstance(prompt, str):
        return "/v1/completions", body | {"prompt": prompt}
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], Mapping):
        return "/v1/chat/completions", body | {"messages": items}
    return "/v1/completions", body | {"prompt": items}


@dataclass
class AnswerReader:
    """Reads the server-sent events of one answer, line by line, and makes its `Timing`.

    Attributes:
        model, started: as in `Timing`.
        keep_text: collect the answer's text.
    """

    model: str
    started: float
    keep_text: bool = False
    pieces: list[float] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _tokens: list[str] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _prompt_tokens: int = 0
    _output_tokens: int | None = None
    _closed: bool = False
    _error: tuple[str, str] | None = None

    def feed(self, line: bytes | str, now: float) -> None:
        """One line of the body that came at `now` of ``time.perf_counter()``."""
        line = line.strip()
        if isinstance(line, str):
            line = line.encode()
        if not line.startswith(b"data:") or self._error:
            return
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            self._closed = True
            return
        try:
            event = json.loads(data)
            if "error" in event:
                error = event["error"]
                self.fail("server", str(error.get("message", error) if isinstance(error, dict) else error))
                return
            if event.get("choices"):
                self.pieces.append(now - self.started)
                choice = event["choices"][0]
                if found := choice.get("logprobs"):
                    self._keep_logprobs(found)
                if self.keep_text:
                    self._texts.append(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
            if usage := event.get("usage"):
                self._prompt_tokens, self._output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            self.fail("malformed", f"{type(problem).__name__} in {data[:200]!r}")

    def _keep_logprobs(self, found: Mapping[str, Any]) -> None:
        """As completions have them, or chats."""
        pieces = found.get("content")
        if pieces is None:
            self._tokens += found["tokens"]
            self._logprobs += found["token_logprobs"]
        else:
            self._tokens += [piece["token"] for piece in pieces]
            self._logprobs += [piece["logprob"] for piece in pieces]

    def fail(self, kind: str, detail: str = "") -> None:
        """The first error is the one that counts."""
        self._error = self._error or (kind, detail[:300])

    def timing(self, now: float, *, left: bool = False) -> Timing:
        """What came of it, at the end of the stream or after `fail`."""
        if not left and not self._closed:
            self.fail("cut", "the stream ended without [DONE]")
        if not left and not self.pieces:
            self.fail("empty")
        error, detail = self._error or (None, "")
        return Timing(
            model=self.model,
            started=self.started,
            seconds=now - self.started,
            pieces=tuple(self.pieces),
            prompt_tokens=self._prompt_tokens,
            output_tokens=len(self.pieces) if self._output_tokens is None else self._output_tokens,
            error=error,
            detail=detail,
            left=left,
            text="".join(self._texts),
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
        )


def open_session(connections: int = 0) -> aiohttp.ClientSession:
    """A session for load: any number of connections, or at most `connections`.

    vLLM closes those that are idle for 5 s (``VLLM_HTTP_TIMEOUT_KEEP_ALIVE``); they are given up before that, since a
    request that is sent meanwhile is lost.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
        read_bufsize=1 << 20,
    )


async def stream_completion(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    prompt: Prompt,
    max_tokens: int,
    *,
    timeout: float = 600.0,
    api_key: str | None = None,
    leave_after: int | None = None,
    leave_at: float | None = None,
    keep_text: bool = False,
    **options: Any,
) -> Timing:
    """Ask for one answer, read it as it comes, and say when each piece came. Errors are results, never raised.

    Args:
        url: the server's, without a path.
        prompt: text or token ids go to ``/v1/completions``, messages to ``/v1/chat/completions``.
        timeout: for the whole request.
        leave_after: close the connection after so many pieces, as a client that goes away.
        leave_at: close it at this time of ``time.perf_counter()``.
        options: added to the body, as ``ignore_eos=True``.
    """
    path, body = request_body(model, prompt, max_tokens, **options)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    reader = AnswerReader(model, time.perf_counter(), keep_text)
    left = False
    leaves = leave_at is not None and leave_at < reader.started + timeout
    seconds = max(0.001, leave_at - reader.started) if leave_at is not None and leaves else timeout
    try:
        limits = aiohttp.ClientTimeout(total=seconds, sock_connect=30)
        async with session.post(url.rstrip("/") + path, json=body, headers=headers, timeout=limits) as response:
            if response.status != 200:
                reader.fail(f"http {response.status}", (await response.text())[:300])
            else:
                async for line in response.content:
                    reader.feed(line, time.perf_counter())
                    if left := leave_after is not None and len(reader.pieces) >= leave_after:
                        response.close()
                        break
    except asyncio.TimeoutError:
        if not (left := leaves):
            reader.fail("timeout", f"not finished within {timeout:g} s")
    except aiohttp.ClientConnectorError as error:
        reader.fail("refused", str(error))
    except (aiohttp.ClientError, ConnectionError, ValueError) as error:
        reader.fail("disconnected", f"{type(error).__name__}: {error}")
    return reader.timing(time.perf_counter(), left=left)
