"""The requests of the soak test: in an open loop, some left in the middle of their answer, some of them checked later.

Requests come at the times of a trace, whatever became of those before them. Some clients close the connection after a
few pieces of the answer, some before the first one. Of a sample tokens and log-probabilities are kept.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from openai_client import Timing, stream_completion
from soak_adapters import ARRIVING, BASE, History
from workload import BASE as BASE_NUMBER
from workload import Trace

Fate = Literal["whole", "left", "cancelled"]

LEFT_SHARE, CANCELLED_SHARE = 0.04, 0.02
ARRIVED_SHARE = 0.1
"""Of the requests: to adapters that were loaded while the server ran, if there are any."""
STEMS = 16
TOLD: dict[str, Any] = {"logprobs": 1, "return_tokens_as_token_ids": True}
"""What a request asks for whose answer is checked."""
TIMEOUT = 300.0


@dataclass(frozen=True)
class SharedStems(Trace):
    """Prompts are the beginnings of a few texts: blocks of the prefix cache fit, and must be of the right adapter."""

    def prompt_ids(self, index: int, vocabulary: int, round_: int = 0) -> list[int]:
        draw = random.Random(f"stem {self.spec.seed} {index % STEMS}")
        longest = draw.choices(range(vocabulary // 50, vocabulary), k=self.spec.prompt[1])
        return longest[: self.requests[index].prompt_tokens]


@dataclass(frozen=True)
class Answer:
    """One request and what came of it.

    Attributes:
        index: in the trace, which has its prompt.
        due: when it should have been sent, by ``time.perf_counter()``.
        prompt_tokens, output_tokens: asked for.
        fate: ``whole``: the client waits for the end; ``left``: it closes the connection in the middle of the answer;
            ``cancelled``: before its first piece, most of the time.
        checked: tokens and log-probabilities are there.
    """

    index: int
    name: str
    due: float
    prompt_tokens: int
    output_tokens: int
    fate: Fate
    checked: bool
    timing: Timing

    @property
    def sent(self) -> float:
        return self.timing.started

    @property
    def ended(self) -> float:
        return self.timing.started + self.timing.seconds

    @property
    def token_ids(self) -> list[int]:
        return [int(token.removeprefix("token_id:")) for token in self.timing.tokens]


@dataclass
class SoakTraffic:
    """Sends a trace.

    Attributes:
        names: the trace's adapter i is the i-th of these.
        history: what names mean; those that have arrived are asked for too.
        checked_share: of the answers that are waited for.
        answers: so far, in the order of their ends.
    """

    session: aiohttp.ClientSession
    url: str
    trace: Trace
    names: Sequence[str]
    vocabulary: int
    history: History
    checked_share: float
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    async def send(self, begin: float, seconds: float, stop: asyncio.Event, on_answer: Callable[[], None]) -> None:
        """Every request of the first `seconds`; returns when the last one has ended. `stop` sends no more."""
        running: set[asyncio.Task[None]] = set()
        for index, request in enumerate(self.trace.requests):
            due = begin + request.at
            if request.at >= seconds:
                break
            await _sleep_until(due, stop)
            if stop.is_set():
                break
            task = asyncio.create_task(self._one(index, due, on_answer))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _one(self, index: int, due: float, on_answer: Callable[[], None]) -> None:
        request, draw = self.trace.requests[index], self._random
        name = BASE if request.adapter == BASE_NUMBER else self.names[request.adapter]
        if arrived := [n for n in ARRIVING if n in self.history.spells]:
            name = draw.choice(arrived) if draw.random() < ARRIVED_SHARE else name
        fate = _fate(draw)
        checked = fate == "whole" and draw.random() < self.checked_share
        options: dict[str, object] = {"ignore_eos": True}
        if checked:
            options |= TOLD
        timing = await stream_completion(
            self.session,
            self.url,
            name,
            self.trace.prompt_ids(index, self.vocabulary),
            request.output_tokens,
            timeout=TIMEOUT,
            leave_after=draw.randint(1, max(1, request.output_tokens - 2)) if fate == "left" else None,
            leave_at=time.perf_counter() + draw.uniform(0.001, 0.1) if fate == "cancelled" else None,
            **options,
        )
        self.answers.append(
            Answer(index, name, due, request.prompt_tokens, request.output_tokens, fate, checked, timing)
        )
        on_answer()


def _fate(draw: random.Random) -> Fate:
    place = draw.random()
    if place < LEFT_SHARE:
        return "left"
    return "cancelled" if place < LEFT_SHARE + CANCELLED_SHARE else "whole"


async def _sleep_until(due: float, stop: asyncio.Event) -> None:
    """Until `due` of ``time.perf_counter()`` or `stop`."""
    while not stop.is_set() and (left := due - time.perf_counter()) > 0:
        await asyncio.sleep(min(left, 0.5))
