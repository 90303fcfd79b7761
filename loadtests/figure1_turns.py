"""Two servers taking turns under the same traffic, until the spread of their ratio is known."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metrics_page import wait_until_idle
from openai_client import Timing, open_session
from replay import Target, replay_by_users
from traffic_summary import TrafficSummary, summarise
from workload import Trace

from vllm_jdlora.errors import JDLoRAError

# Two-sided 95 % of Student's t, by degrees of freedom.
_STUDENT = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class TurnSpec:
    """How each turn goes, and how many there are.

    Attributes:
        users: of the closed loop.
        seconds: of a turn, without `settle`.
        settle: seconds before that which are not counted: all users begin at once.
        least, most: turns of each server.
        spread: turns end early once the 95 % interval of the mean ratio is ± this share of it.
    """

    users: int
    seconds: float
    settle: float
    least: int
    most: int
    spread: float


@dataclass(frozen=True)
class Turns:
    """What came of a point: one summary a turn for the base and for the server beside it, in pairs."""

    base: list[TrafficSummary]
    server: list[TrafficSummary]

    @property
    def ratios(self) -> list[float]:
        """Output tokens/s of the server relative to the base, pair by pair."""
        pairs = zip(self.server, self.base, strict=True)
        return [one.output_tokens_per_second / other.output_tokens_per_second for one, other in pairs]

    @property
    def errors(self) -> int:
        return sum(sum(turn.errors.values()) for turn in (*self.base, *self.server))

    def as_json(self) -> dict[str, Any]:
        return {name: [turn.as_json() for turn in turns] for name, turns in vars(self).items()}


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean, relative to it; infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    t = _STUDENT[min(len(values) - 1, len(_STUDENT) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values)) / statistics.fmean(values)


def take_turns(
    base: Target, server: Target, trace: Trace, spec: TurnSpec, *, on_turn: Callable[[str], None] = lambda what: None
) -> Turns:
    """Pairs of turns under the same requests, the order changing from pair to pair.

    Raises:
        JDLoRAError: a server gave no token in a turn, or is gone.
    """
    turns = Turns([], [])
    for pair in range(spec.most):
        # There and back: what follows what is not always the same.
        order = [(base, turns.base), (server, turns.server)]
        for target, kept in order if pair % 2 == 0 else order[::-1]:
            kept.append(asyncio.run(_turn(target, trace, spec, pair)))
            if kept[-1].output_tokens_per_second == 0:
                raise JDLoRAError(f"{target.url} gave no token in {spec.seconds:g} s: {kept[-1].errors or 'no error'}")
            wait_until_idle(target.url)
            on_turn(f"turn {pair + 1}")
        if pair + 1 >= spec.least and half_width(turns.ratios) <= spec.spread:
            break
    return turns


async def warm_up(target: Target, trace: Trace, spec: TurnSpec) -> None:
    """As long as a turn settles, from the end of the trace: what is made for a shape or at first use is made."""
    until = time.perf_counter() + spec.settle
    first = len(trace.requests) - spec.users
    async with open_session() as session:
        await replay_by_users(
            session, target, trace, spec.users, until=until, first=first, on_answer=lambda answered: None
        )
    wait_until_idle(target.url)


async def _turn(target: Target, trace: Trace, spec: TurnSpec, pair: int) -> TrafficSummary:
    timings: list[Timing] = []
    # Each pair begins elsewhere in the trace; both servers of a pair at the same request.
    first = pair * len(trace.requests) // max(1, spec.most)
    async with open_session() as session:
        begin = time.perf_counter() + spec.settle
        end = begin + spec.seconds
        await replay_by_users(
            session, target, trace, spec.users, until=end, first=first, on_answer=lambda a: timings.append(a.timing)
        )
    return summarise(timings, begin, end)
