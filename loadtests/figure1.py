"""The paper's Figure 1 on the real engine: throughput and first tokens over unique adapters (`make figure1`).

(a) base without LoRA, (b) one adapter in stock vLLM, (c) stock multi-LoRA with slots of equal memory, (d) with a slot
for each adapter, (e) this package with uncompressed adapters, (f) compressed. Every point is a real `vllm serve` that
takes turns with the base, which stays up beside it, under the same requests from the same users, so that the machine's
drift cancels in their ratio; pairs of turns go on until the spread of that ratio is known. Requests stream over HTTP
and name each adapter equally often. Speed does not depend on what weights are: where there are fewer real adapters than
a point has, all of its adapters are random ones of the same shapes.

A line of JSON for each finished point goes to `results/figure1.jsonl`; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_conditions import ROOT, add_model_flags, available_bytes, conditions, default_dtype, default_model
from bench_engine import stop_on_termination
from bench_rows import TARGETS
from figure1_points import SERIES, SHORT, SHORT_SERIES, LoRABytes, Point, points_of
from figure1_report import markdown
from figure1_results import Measured, Results
from figure1_servers import BASE, Engine, Provisions
from figure1_turns import TurnSpec, take_turns, warm_up
from plot_figure1 import PICTURE, RESULTS, plot
from replay import Target
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from synthetic_collections import model_slices
from workload import Trace, add_arguments, generate, spec_of

from vllm_jdlora.demo.server import Server
from vllm_jdlora.errors import JDLoRAError

TRACE_REQUESTS = 4096
_ENGINE_BYTES = 2_000_000_000
"""Of one server of SmolLM2-135M without adapters, at most."""
_UNTOLD = 5
"""A slot for every linear module and the logits has about as many times the numbers of one for q, k and v."""


@dataclass
class Figure:
    """A run: what is shared by its points."""

    args: argparse.Namespace
    engine: Engine
    turns: TurnSpec
    results: Results
    provisions: Provisions
    progress: Progress

    def target(self, server: Server, adapters: list[str] | None) -> Target:
        return Target(server.url, BASE, adapters, self.vocabulary, timeout=self.args.timeout)

    @property
    def vocabulary(self) -> int:
        size: int = json.loads((self.engine.model / "config.json").read_text())["vocab_size"]
        return size

    def trace(self, adapters: int) -> Trace:
        return generate(spec_of(self.args, adapters=adapters, requests=TRACE_REQUESTS))

    def measure(self, points: list[Point]) -> dict[str, str]:
        """All points, beside one base server; title → reason of those that could not be measured."""
        failed: dict[str, str] = {}
        steps = 2 + 2 * self.turns.most
        task = self.progress.add_task("starting (a)", total=1 + steps * len(points))
        plain = [p.adapters for p in points if p.slots is not None]
        with self._serving("a", self.engine.arguments()) as (base, _):
            asyncio.run(warm_up(self.target(base, None), self.trace(1), self.turns))
            self.progress.advance(task)
            for done, point in enumerate(points):
                title = f"({point.series}) {point.adapters:,}"
                try:
                    self._measure(point, base, max(plain, default=0), task, title)
                except (JDLoRAError, OSError) as error:
                    self.progress.console.print(f"{title} is left out: {error}", markup=False)
                    failed[title] = str(error)
                    if base.exit_code() is not None:
                        raise JDLoRAError(f"the base server ended: see {base.log_path}") from error
                self.progress.update(task, completed=1 + steps * (done + 1))
        return failed

    def _measure(self, point: Point, base: Server, most: int, task: TaskID, title: str) -> None:
        needed, there = self._bytes_needed(point), available_bytes()
        if needed > there:
            raise JDLoRAError(f"it needs {needed / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are free")
        self.progress.update(task, description=f"{title}: making its adapters")
        served = self.provisions.served(point, most)
        self.progress.update(task, description=f"{title}: starting", advance=1)
        with self._serving(f"{point.series}-{point.adapters}", served.arguments) as (server, start_seconds):
            trace, own = self.trace(point.adapters), self.target(server, served.adapters)
            self.progress.update(task, description=f"{title}: warming up", advance=1)
            asyncio.run(warm_up(own, trace, self.turns))
            turns = take_turns(
                self.target(base, None),
                own,
                trace,
                self.turns,
                on_turn=lambda what: self.progress.update(task, description=f"{title}: {what}", advance=1),
            )
        self.results.add(
            Measured(
                point=point,
                real=served.real,
                error=served.error,
                base=[turn.as_json() for turn in turns.base],
                server=[turn.as_json() for turn in turns.server],
                start_seconds=round(start_seconds, 1),
                conditions={**conditions(), "load_average": os.getloadavg()},
            )
        )

    def _bytes_needed(self, point: Point) -> int:
        """Of a server with its adapters: slots or bases, and each adapter again as vLLM keeps it beside its slots."""
        slot = LoRABytes(tuple(model_slices(self.engine.model, TARGETS[self.provisions.targets]))).slot
        kept = 0 if point.slots is None else point.adapters * slot
        return _ENGINE_BYTES + kept + point.lora_bytes * (_UNTOLD if point.series == "c-default" else 1)

    @contextmanager
    def _serving(self, name: str, arguments: list[str]) -> Iterator[tuple[Server, float]]:
        log = self.args.logs / f"{name}.log" if self.args.logs else self.provisions.scratch / f"{name}.log"
        server = Server(arguments, timeout=self.args.start_timeout, log_path=log)
        begin = time.monotonic()
        with server:
            yield server, time.monotonic() - begin


def points_wanted(args: argparse.Namespace, model: Path) -> list[Point]:
    slices = model_slices(model, TARGETS[args.targets])
    series, counts = args.series, args.points
    if args.short:
        series, counts = series or SHORT_SERIES, counts or SHORT
    clusters = dict(args.clusters or [])
    return points_of(slices, series=series, counts=counts, clusters=clusters)


def settings_of(args: argparse.Namespace, engine: Engine, turns: TurnSpec) -> dict[str, Any]:
    """What must be equal for points to stand in one figure. The number of pairs may differ."""
    traffic = {**asdict(spec_of(args, adapters=1, requests=TRACE_REQUESTS))}
    traffic.pop("adapters")
    turn = {key: value for key, value in asdict(turns).items() if key in ("users", "seconds", "settle")}
    cores = len(os.sched_getaffinity(0))
    shared = {**asdict(engine), "model": engine.model.name, "targets": args.targets, "cores": cores}
    # As they come back from the file: tuples are lists there.
    settings: dict[str, Any] = json.loads(json.dumps({"engine": shared, "traffic": traffic, "turn": turn}))
    return settings


def _clusters(text: str) -> tuple[int, int]:
    adapters, _, clusters = text.partition("=")
    return int(adapters), int(clusters)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [series.key for series in SERIES]
    parser.add_argument("--series", nargs="+", choices=keys, metavar="SERIES", help=f"of {', '.join(keys)}; all")
    parser.add_argument("--points", nargs="+", type=int, metavar="N", help="numbers of adapters; default: the figure's")
    parser.add_argument(
        "--short", action="store_true", help=f"(c) and (f) at {SHORT}, two short turns each: does it run, and roughly"
    )
    parser.add_argument("--clusters", nargs="+", type=_clusters, metavar="N=K", help="instead of the rule's")
    parser.add_argument("--targets", choices=list(TARGETS), default="attention", help="modules that adapters change")
    parser.add_argument("--adapters", type=Path, default=ROOT / "demo" / "adapters", help="real ones, of rank 16")
    parser.add_argument("--synthetic", action="store_true", help="random adapters at every point")
    add_model_flags(parser)
    parser.add_argument("--users", type=int, default=32, help="that ask one request after the other")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a turn that count")
    parser.add_argument("--settle", type=float, default=15.0, help="seconds before that")
    parser.add_argument("--least-turns", type=int, default=3)
    parser.add_argument("--most-turns", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.02, help="± of the mean ratio, at 95 %%, that is enough")
    parser.add_argument("--kv-cache-bytes", type=int, default=512 << 20, help="of each server")
    parser.add_argument("--timeout", type=float, default=600.0, help="of a request, seconds")
    parser.add_argument("--start-timeout", type=float, default=1200.0, help="of a server, seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help=f"default: {PICTURE.name} in docs; none of a short run")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; default: thrown away")
    parser.add_argument("--scratch", type=Path, help="folder for adapters and collections; default: a temporary one")
    # A quarter of S-LoRA's range: a CPU answers some hundred tokens a second, and a turn must hold many requests.
    add_arguments(parser, prompt=(8, 128), output=(8, 128))
    args = parser.parse_args()
    if args.short:
        args.seconds, args.settle = min(args.seconds, 15.0), min(args.settle, 6.0)
        args.least_turns = args.most_turns = 2
    else:
        args.picture = args.picture or PICTURE
    if args.arrivals != "closed":
        parser.error("figure 1 is measured in a closed loop: replay.py replays a trace at its own times")
    if not 1 <= args.least_turns <= args.most_turns:
        parser.error("--least-turns is between 1 and --most-turns")
    return args


def main() -> None:
    args = parsed()
    stop_on_termination()
    model = args.model or default_model()
    longest = args.prompt_tokens[1] + args.output_tokens[1]
    engine = Engine(model, args.dtype or default_dtype(), args.users, longest, args.kv_cache_bytes)
    turns = TurnSpec(args.users, args.seconds, args.settle, args.least_turns, args.most_turns, args.spread)
    results = Results(args.results, settings_of(args, engine, turns))
    wanted = points_wanted(args, model)
    points = [point for point in wanted if not results.has(point)]
    print(f"{len(wanted)} points, {len(wanted) - len(points)} of them measured before")
    failed: dict[str, str] = {}
    if points:
        with tempfile.TemporaryDirectory(prefix="jdlora-figure1-", dir=args.scratch) as scratch:
            provisions = Provisions(Path(scratch), engine, None if args.synthetic else args.adapters, args.targets)
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            # Turns take the same time, starts do not: the estimate looks back over half an hour.
            with Progress(*columns, speed_estimate_period=1800) as progress:
                failed = Figure(args, engine, turns, results, provisions, progress).measure(points)
    measured = results.measured()
    if measured:
        print(markdown(measured))
        print(f"results in {args.results}")
        if args.picture:
            print(f"drawn in {plot(measured, args.picture)}")
    for title, reason in failed.items():
        print(f"not measured: {title}: {reason}")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
