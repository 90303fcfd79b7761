"""One soak of a running server: warm up, measure its capacity, send everything at once, wait until all is answered."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
from bench_engine import stop_on_termination
from openai_client import open_session
from process_tree import child_of_port
from replay import Answered, Target, replay_by_users
from rich.progress import Progress, TaskID
from soak_adapters import BASE, SoakAdapters
from soak_churn import Operator
from soak_counts import Clients, Comparison, compare_counts, http_growth
from soak_hostile import HostileClient, hostile_requests, keep_sending
from soak_traffic import TOLD, SharedStems, SoakTraffic
from soak_watch import Watch
from traffic_summary import TrafficSummary, summarise
from workload import Trace, TraceRequest, TrafficSpec, generate

from vllm_jdlora.demo.server import Server
from vllm_jdlora.errors import JDLoRAError

CONTEXT, BATCH = 512, 32
"""Tokens of a prompt and its answer; requests that run at once."""
CAPACITY_REQUESTS = 4096
WARM_TOKENS = 256
"""On CPU oneDNN keeps code for 1,024 shapes of products, and a model has four for each number of tokens in a step."""
RELOADS = 18
"""In the whole soak: the operator's six reloads once in each third of it, so that thirds can be compared."""
DRAIN_SECONDS = 180.0


@dataclass(frozen=True)
class Soaked:
    """What came of a soak.

    Attributes:
        begin: of it, by ``time.perf_counter()``. seconds: how long requests were sent.
        rate: requests/s on average.
        interrupted: it was ended early.
    """

    begin: float
    seconds: float
    rate: float
    capacity: TrafficSummary
    trace: SharedStems
    clients: Clients
    watch: Watch
    comparisons: list[Comparison]
    http: dict[str, int]
    idle: bool
    exit_code: int | None
    interrupted: bool


@dataclass
class Soak:
    """A run on one server."""

    args: argparse.Namespace
    model: Path
    adapters: SoakAdapters
    server: Server
    progress: Progress

    def __post_init__(self) -> None:
        self.vocabulary: int = json.loads((self.model / "config.json").read_text())["vocab_size"]

    async def run(self) -> Soaked:
        """Warm up, measure the capacity, soak, and wait until all is answered."""
        async with open_session() as session:
            target = Target(self.server.url, BASE, self.adapters.names, self.vocabulary)
            await self._warm_up(session, target)
            capacity = await self._capacity(session, target)
            rate = self.args.load * capacity.requests_per_second
            history = self.adapters.history()
            watch = Watch(session, self.server.url, child_of_port(self.server.port))
            trace = self._trace(f"gamma:{rate:.4f}:1", int(1.2 * rate * self.args.seconds) + 50, self.args.seed)
            operator = Operator(session, self.server.url, self.adapters, history, self.args.seed)
            hostile = HostileClient(session, self.server.url)
            share = min(1.0, self.args.checked / (rate * self.args.seconds))
            traffic = SoakTraffic(
                session, self.server.url, trace, self.adapters.names, self.vocabulary, history, share, self.args.seed
            )
            clients = Clients(traffic.answers, hostile, operator, history)
            await watch.until_idle(DRAIN_SECONDS)
            before = await watch.counters()
            watch.seen.clear()
            begin, stop = time.perf_counter(), asyncio.Event()

            def over() -> bool:
                if self.server.exit_code() is not None:
                    stop.set()
                return stop.is_set() or time.perf_counter() >= begin + self.args.seconds

            task = self.progress.add_task("soaking", total=self.args.seconds)
            answered = self._shown(task, begin, clients)
            names = self.adapters.names
            with Interrupts(stop):
                await asyncio.gather(
                    traffic.send(begin, self.args.seconds, stop, answered),
                    keep_sending(hostile, hostile_requests(names, CONTEXT, self.args.seed), self.args.hostile, over),
                    operator.run(
                        over,
                        call_every=self.args.calls,
                        reload_every=max(self.args.seconds / RELOADS, self.args.least_reload),
                        last_reload=begin + 0.9 * self.args.seconds,
                    ),
                    watch.keep_looking(self.args.look, over),
                )
                seconds = min(self.args.seconds, time.perf_counter() - begin)
            exit_code = self.server.exit_code()
            idle, comparisons, http = False, [], {}
            if exit_code is None:
                idle = await watch.until_idle(DRAIN_SECONDS)
                after = await watch.counters()
                comparisons = compare_counts(clients, before, after, self._revision(operator))
                http = http_growth(before, after)
        return Soaked(
            begin=begin,
            seconds=seconds,
            rate=rate,
            capacity=capacity,
            trace=trace,
            clients=clients,
            watch=watch,
            comparisons=comparisons,
            http=http,
            idle=idle,
            exit_code=exit_code,
            interrupted=stop.is_set() and exit_code is None,
        )

    async def _warm_up(self, session: aiohttp.ClientSession, target: Target) -> None:
        """Many adapters, steps of each size, full batches: what is allocated at first use is there afterwards."""
        known = len(self.adapters.names)
        count = min(known, 2 * self.args.slots)
        spec = TrafficSpec(known, count, popularity="distinct", prompt=(8, 9), output=(2, 3))
        sizes = tuple(TraceRequest(0.0, i % known, i + 1, 1) for i in range(WARM_TOKENS))
        # The allocator keeps what the largest step took, which has log-probabilities of a whole batch.
        longest, most = self.args.prompt_tokens[1] - 1, self.args.output_tokens[1] - 1
        full = tuple(TraceRequest(0.0, i % known, longest, most) for i in range(2 * BATCH))
        telling = replace(target, options={**target.options, **TOLD})
        task = self.progress.add_task("warming up", total=count + len(sizes) + len(full))
        for whom, trace, users in (
            (target, generate(spec), BATCH),
            (target, Trace(spec, sizes), 1),
            (telling, Trace(spec, full), BATCH),
        ):
            await replay_by_users(session, whom, trace, users, on_answer=lambda answered: self._counted(answered, task))

    async def _capacity(self, session: aiohttp.ClientSession, target: Target) -> TrafficSummary:
        """As many users as a batch holds, who ask again as soon as they are answered."""
        trace = self._trace("closed", CAPACITY_REQUESTS, self.args.seed + 1)
        seconds, settle = self.args.capacity_seconds, self.args.capacity_seconds / 4
        task = self.progress.add_task("measuring the capacity", total=seconds + settle)
        begin = time.perf_counter()
        answers: list[Answered] = []

        def on_answer(answered: Answered) -> None:
            self._counted(answered, task)
            answers.append(answered)
            self.progress.update(task, completed=time.perf_counter() - begin)

        end = begin + settle + seconds
        await replay_by_users(session, target, trace, BATCH, until=end, on_answer=on_answer)
        return summarise((a.timing for a in answers), begin + settle, end)

    def _counted(self, answered: Answered, task: TaskID) -> None:
        if answered.timing.error:
            raise JDLoRAError(f"a request failed before the soak: {answered.timing.error} {answered.timing.detail}")
        self.progress.advance(task)

    def _trace(self, arrivals: str, requests: int, seed: int) -> SharedStems:
        spec = TrafficSpec(
            len(self.adapters.names),
            requests,
            arrivals=arrivals,
            popularity=self.args.popularity,
            prompt=tuple(self.args.prompt_tokens),
            output=tuple(self.args.output_tokens),
            base_share=self.args.base_share,
            seed=seed,
        )
        return SharedStems(spec, generate(spec).requests)

    def _shown(self, task: TaskID, begin: float, clients: Clients) -> Callable[[], None]:
        def answered() -> None:
            errors = sum(a.timing.error not in (None, "http 404") for a in clients.answers[-200:])
            bad = errors + clients.hostile.wrong_count + len(clients.operator.failed)
            said = f"soaking, {len(clients.answers):,} answers" + (f", {bad} WRONG" if bad else "")
            self.progress.update(task, completed=time.perf_counter() - begin, description=said)

        return answered

    def _revision(self, operator: Operator) -> str:
        folder, _ = self.adapters.revisions[operator.revision]
        revision: str = json.loads((folder / "collection.json").read_text())["revision"]
        return revision


class Interrupts:
    """Ctrl-C and SIGTERM set `stop`, once; a second one acts as always."""

    def __init__(self, stop: asyncio.Event):
        self._stop = stop

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._once)

    def __exit__(self, *rest: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)
        stop_on_termination()

    def _once(self) -> None:
        self._stop.set()
        self._loop.remove_signal_handler(signal.SIGINT)
