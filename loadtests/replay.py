"""Replay a trace against any OpenAI-compatible server: at its own times, or as a closed loop of N users.

    python loadtests/workload.py trace.jsonl --arrivals gamma:2:1 --popularity power:0.3 --adapters 1000 --requests 600
    python loadtests/replay.py trace.jsonl --url http://localhost:8000 --results answers.jsonl
    python loadtests/replay.py trace.jsonl --url http://localhost:8000 --users 32 --seconds 60

Adapters are those that the server lists, sorted, or a file's in its order; the trace's adapter i is the i-th of them.
The results are a header, one line for each request as it ends, and a summary.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from openai_client import Timing, open_session, stream_completion
from served_models import ask_models, read_names
from traffic_summary import SLO_SECONDS, TrafficSummary, lines_of, summarise
from workload import BASE, Trace

from vllm_jdlora.errors import JDLoRAError


@dataclass(frozen=True)
class Target:
    """Where a trace goes, and under which names.

    Attributes:
        url: the server's.
        base: name of the base model.
        adapters: the trace's adapter i is the i-th of these. None: every request goes to the base.
        vocabulary: prompts are token ids below it; None: prompts are text.
        api_key: the server's.
        timeout: seconds for each request.
        options: added to every request's body. Without ``ignore_eos`` an answer may be shorter than the trace says.
    """

    url: str
    base: str
    adapters: Sequence[str] | None = None
    vocabulary: int | None = None
    api_key: str | None = None
    timeout: float = 600.0
    options: dict[str, Any] = field(default_factory=lambda: {"ignore_eos": True})

    def check(self, trace: Trace) -> None:
        """Raises: JDLoRAError: the trace names more adapters than there are."""
        if self.adapters is not None and len(self.adapters) < trace.spec.adapters:
            raise JDLoRAError(
                f"the trace names {trace.spec.adapters} adapters and there are {len(self.adapters)}: make a trace of "
                f"at most as many, or serve more"
            )

    def model(self, adapter: int) -> str:
        return self.base if adapter == BASE or self.adapters is None else self.adapters[adapter]


@dataclass(frozen=True)
class Answered:
    """One request of a trace and what came of it; `due`: when it should have been sent, by ``time.perf_counter()``."""

    index: int
    due: float
    timing: Timing

    def as_json(self, begin: float) -> dict[str, Any]:
        """For JSON; times of sending after `begin`."""
        record = self.timing.as_json()
        return {
            "index": self.index,
            "due": round(self.due - begin, 6),
            **record,
            "started": round(record["started"] - begin, 6),
        }


OnAnswer = Callable[[Answered], None]


async def replay_at_its_times(
    session: aiohttp.ClientSession, target: Target, trace: Trace, *, time_scale: float = 1.0, on_answer: OnAnswer
) -> None:
    """Every request at its time, `time_scale` times as slow, whatever became of those before it (an open loop)."""
    target.check(trace)
    begin = time.perf_counter()

    async def one(index: int, due: float) -> None:
        await asyncio.sleep(due - time.perf_counter())
        on_answer(Answered(index, due, await _ask(session, target, trace, index)))

    await asyncio.gather(*(one(i, begin + time_scale * r.at) for i, r in enumerate(trace.requests)))


async def replay_by_users(
    session: aiohttp.ClientSession,
    target: Target,
    trace: Trace,
    users: int,
    *,
    until: float | None = None,
    first: int = 0,
    on_answer: OnAnswer,
) -> None:
    """`users` ask one request after the other in the trace's order (a closed loop).

    Args:
        until: time of ``time.perf_counter()`` at which all leave; the trace begins again, with other prompts, until
            then. None: until every request was asked once.
        first: the number of the request to begin with.
    """
    target.check(trace)
    numbers: Iterator[int] = itertools.count(first) if until is not None else iter(range(first, len(trace.requests)))

    async def user() -> None:
        for number in numbers:
            now = time.perf_counter()
            if until is not None and now >= until:
                return
            round_, index = divmod(number, len(trace.requests))
            timing = await _ask(session, target, trace, index, round_, leave_at=until)
            on_answer(Answered(index, now, timing))
            if timing.error:
                await asyncio.sleep(0.1)  # a server that refuses must not be asked thousands of times a second

    await asyncio.gather(*(user() for _ in range(users)))


async def _ask(
    session: aiohttp.ClientSession, target: Target, trace: Trace, index: int, round_: int = 0, **options: Any
) -> Timing:
    request = trace.requests[index]
    prompt: str | list[int]
    if target.vocabulary is None:
        prompt = trace.prompt_text(index, round_)
    else:
        prompt = trace.prompt_ids(index, target.vocabulary, round_)
    return await stream_completion(
        session,
        target.url,
        target.model(request.adapter),
        prompt,
        request.output_tokens,
        timeout=target.timeout,
        api_key=target.api_key,
        **options,
        **target.options,
    )


async def run(args: argparse.Namespace, trace: Trace, target: Target) -> TrafficSummary:
    """Replay as the flags say, with a progress bar; write the results if asked to."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    answers: list[Answered] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with ExitStack() as stack:
        results = stack.enter_context(args.results.open("w")) if args.results else None
        progress = stack.enter_context(Progress(*columns, disable=args.json))
        task = progress.add_task("replaying", total=args.seconds or len(trace.requests))
        begin = time.perf_counter()

        def say(line: dict[str, Any]) -> None:
            if results:
                results.write(json.dumps(line) + "\n")

        def on_answer(answered: Answered) -> None:
            answers.append(answered)
            say(answered.as_json(begin))
            done = time.perf_counter() - begin if args.seconds else len(answers)
            errors = sum(a.timing.error is not None for a in answers)
            progress.update(task, completed=done, description=f"replaying, {errors} errors" if errors else "replaying")

        mode = {"users": args.users, "seconds": args.seconds, "time_scale": args.time_scale}
        say({"replay": 1, "url": target.url, "trace": asdict(trace.spec), **mode})
        async with open_session() as session:
            if args.users:
                until = begin + args.seconds if args.seconds else None
                await replay_by_users(session, target, trace, args.users, until=until, on_answer=on_answer)
            else:
                await replay_at_its_times(session, target, trace, time_scale=args.time_scale, on_answer=on_answer)
        end = max((a.timing.started + a.timing.seconds for a in answers), default=begin)
        summary = summarise((a.timing for a in answers), begin, end + 1e-6, slo=args.slo)
        say({"summary": summary.as_json(), "latest_seconds": _latest(answers)})
    return summary


def _latest(answers: Sequence[Answered]) -> float:
    """How late this client sent a request at worst: more than a little, and it measures itself."""
    return round(max((a.timing.started - a.due for a in answers), default=0.0), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="made by loadtests/workload.py")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--users", type=int, help="a closed loop of so many; default: the trace's own times")
    parser.add_argument("--seconds", type=float, help="of a closed loop; default: every request once")
    parser.add_argument("--time-scale", type=float, default=1.0, help="times of the trace are multiplied by it")
    parser.add_argument("--adapters", type=Path, help="file of names, one a line; default: what the server lists")
    parser.add_argument("--base", help="name of the base model, where the server does not say")
    parser.add_argument("--vocabulary", type=int, help="prompts are token ids below it; default: text")
    parser.add_argument("--slo", type=float, default=SLO_SECONDS, help="limit of the time to the first token, seconds")
    parser.add_argument("--timeout", type=float, default=600.0, help="of a request, seconds")
    parser.add_argument("--results", type=Path, help="JSONL")
    parser.add_argument("--json", action="store_true", help="the summary as JSON, and nothing else")
    args = parser.parse_args()
    try:
        if args.seconds and not args.users:
            raise JDLoRAError("--seconds needs --users: a trace at its own times ends by itself")
        trace = Trace.read(args.trace)
        if not args.users and trace.spec.arrivals == "closed":
            raise JDLoRAError("the trace has no times of its own: say --users N")
        api_key = os.environ.get("OPENAI_API_KEY")
        served = ask_models(args.url, api_key=api_key, base=args.base)
        names = read_names(args.adapters) if args.adapters else served.adapters
        target = Target(args.url, served.base, names, args.vocabulary, api_key, args.timeout)
        target.check(trace)
        summary = asyncio.run(run(args, trace, target))
    except JDLoRAError as error:
        parser.error(str(error))
    print(json.dumps(summary.as_json()) if args.json else "\n".join(lines_of(summary)))
    if summary.errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
