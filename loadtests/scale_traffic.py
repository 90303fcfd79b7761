"""The requests of the scale benchmark: uniform over all adapters, and adapters never asked for beside familiar ones."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import aiohttp
from openai_client import Timing, stream_completion
from workload import Trace, TrafficSpec, generate

from vllm_jdlora.errors import JDLoRAError


@dataclass(frozen=True)
class Ask:
    """One request; `kind` is for who sorts the answers."""

    model: str
    prompt: list[int]
    tokens: int
    kind: str = "uniform"


@dataclass(frozen=True)
class Shape:
    """Tokens of each prompt and of each answer; `vocabulary` of the model."""

    prompt: int
    answer: int
    vocabulary: int

    def trace(self, adapters: int, requests: int, seed: int) -> Trace:
        lengths = {"prompt": (self.prompt, self.prompt + 1), "output": (self.answer, self.answer + 1)}
        return generate(TrafficSpec(adapters, requests, popularity="power:1", seed=seed, **lengths))


def uniform(adapters: Sequence[str], shape: Shape, requests: int, seed: int) -> list[Ask]:
    """Each request asks for an adapter drawn from all of them, with a prompt of random tokens: no prefix is cached."""
    trace = shape.trace(len(adapters), requests, seed)
    return [
        Ask(adapters[request.adapter], trace.prompt_ids(i, shape.vocabulary), shape.answer)
        for i, request in enumerate(trace.requests)
    ]


def cold_beside_warm(never: Sequence[str], familiar: Sequence[str], shape: Shape, seed: int) -> list[Ask]:
    """Each adapter of `never` once, and as many requests for familiar ones, in an order drawn at random."""
    asks = [replace(ask, kind="warm") for ask in uniform(familiar, shape, 2 * len(never), seed)]
    places = random.Random(seed).sample(range(len(asks)), len(never))
    for name, place in zip(never, places, strict=True):
        asks[place] = replace(asks[place], model=name, kind="cold")
    return asks


async def closed_loop(
    session: aiohttp.ClientSession,
    url: str,
    asks: Sequence[Ask],
    concurrency: int,
    answered: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[Ask, Timing]], float]:
    """Answers, as they ended, and the seconds of all: `concurrency` clients ask again as soon as they are answered.

    Raises:
        JDLoRAError: a request failed; the rest would be measured under other conditions.
    """
    waiting = iter(asks)
    done: list[tuple[Ask, Timing]] = []

    async def client() -> None:
        for ask in waiting:
            timing = await stream_completion(session, url, ask.model, ask.prompt, ask.tokens, ignore_eos=True)
            if timing.error or timing.output_tokens != ask.tokens:
                raise JDLoRAError(
                    f"a request for {ask.model} got {timing.output_tokens} of {ask.tokens} tokens: "
                    f"{timing.error} {timing.detail}"
                )
            done.append((ask, timing))
            answered()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return done, time.perf_counter() - start
