"""Cluster order on and off on real servers whose base slots are scarce, over HTTP (`make bench-scheduler`).

A `vllm serve` process with `--jd-cluster-order off` (first come, first served) stays up, and for each age cap one with
it on takes turns with it: the same synthetic collection of a real model, and in each round the same trace of
`workload.py` (arrivals by the clock on the wall, clusters and lengths). Told are requests a second from the first
arrival to the last answer, bases brought to the device (from `/metrics`), and the time from a request's arrival to its
first token, of all requests and of those for the rarest clusters. One JSON line for each age cap goes to
`results/bench_cluster_order.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_conditions import conditions, default_dtype, default_model
from bench_engine import stop_on_termination
from cluster_order_report import COUNTERS, RARE, Turn, shown, summary_of, word_of
from metrics_page import fetch_page, read_counters, value_of, wait_until_idle
from openai_client import open_session
from replay import Answered, Target, replay_at_its_times
from rich.console import Console
from rich.progress import Progress
from synthetic_collections import ATTENTION, LINEAR, write_collection
from workload import Trace, TrafficSpec, generate

from vllm_jdlora.collection import Collection
from vllm_jdlora.demo.server import Server
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.records import append_line
from vllm_jdlora.serving.options import AGE_CAP

RESULTS = Path(__file__).parent / "results" / "bench_cluster_order.jsonl"
TARGETS = {"attention": ATTENTION, "linear": LINEAR}
AGE_CAPS = (0.5, 2.0, 8.0)


@dataclass(frozen=True)
class Members:
    """The adapters of a collection, by cluster, those of one cluster side by side."""

    by_cluster: list[list[str]]

    @classmethod
    def of(cls, collection: Collection) -> Members:
        found: dict[int, list[str]] = {}
        for entry in collection.manifest.adapters:
            found.setdefault(entry.cluster, []).append(entry.name)
        return cls([found[cluster] for cluster in sorted(found)])

    @property
    def names(self) -> list[str]:
        return [name for names in self.by_cluster for name in names]

    def asked_by(self, trace: Trace) -> Trace:
        """A trace over clusters as one over `names`: the members of a cluster take turns."""
        first = [0]
        for names in self.by_cluster:
            first.append(first[-1] + len(names))
        requests = tuple(
            replace(r, adapter=first[r.adapter] + i % len(self.by_cluster[r.adapter]))
            for i, r in enumerate(trace.requests)
        )
        return Trace(replace(trace.spec, adapters=first[-1]), requests)


class Bench:
    """One model and one collection, and how they are served and asked."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder = given, folder
        self.model: Path = given.model or default_model()
        self.dtype: str = given.dtype or default_dtype()
        self.vocabulary: int = json.loads((self.model / "config.json").read_text())["vocab_size"]
        self.collection = write_collection(
            folder / "collection",
            self.model,
            TARGETS[given.targets],
            adapters=given.clusters * given.members,
            clusters=given.clusters,
            rank=given.rank,
        )
        self.members = Members.of(self.collection)
        self.clusters = len(self.members.by_cluster)

    def traffic(self, round_: int) -> TrafficSpec:
        given = self.given
        return TrafficSpec(
            self.clusters,
            given.requests,
            arrivals=f"gamma:{given.rate:g}:1",
            popularity=f"zipf:{given.zipf:g}",
            prompt=(max(1, given.prompt // 2), given.prompt + given.prompt // 2 + 1),
            output=(max(1, given.answer // 2), given.answer + given.answer // 2 + 1),
            seed=given.seed + round_,
        )

    @contextmanager
    def serving(self, order: bool, age_cap: float) -> Iterator[Server]:
        """A server that has answered a few requests: its first steps are slow."""
        given = self.given
        arguments = [
            str(self.model),
            f"--dtype={self.dtype}",
            "--served-model-name=base",
            "--max-model-len=256",
            f"--max-num-seqs={given.max_num_seqs}",
            "--max-num-batched-tokens=1024",
            f"--kv-cache-memory-bytes={256 << 20}",
            "--no-enable-prefix-caching",
            "--uvicorn-log-level=warning",
            "--lora-compression=jd",
            f"--lora-collection={self.collection.path}",
            f"--jd-base-slots={given.base_slots}",
            f"--jd-age-cap={age_cap}",
            f"--jd-cluster-order={'auto' if order else 'off'}",
        ]
        log = self.folder / f"serve-{'on' if order else 'off'}-{age_cap:g}.log"
        with Server(arguments, timeout=900, log_path=log) as server:
            lengths = {"prompt": (8, 9), "output": (4, 5)}
            warm_up = TrafficSpec(self.clusters, 2 * given.max_num_seqs, arrivals="gamma:50:1", **lengths)
            asyncio.run(self._replay(server, generate(warm_up)))
            yield server

    def take_turn(self, server: Server, order: bool, round_: int) -> Turn:
        trace = generate(self.traffic(round_))
        before = self._counters(server)
        answers = asyncio.run(self._replay(server, trace))
        after = self._counters(server)
        last = max(a.timing.started + a.timing.seconds for a in answers)
        return Turn(
            order,
            round_,
            seconds=last - min(a.due for a in answers),
            grown={name: after[name] - before[name] for name in COUNTERS},
            waits=[(trace.requests[a.index].adapter, a.timing.started + _ttft(a) - a.due) for a in answers],
        )

    async def _replay(self, server: Server, trace: Trace) -> list[Answered]:
        target = Target(server.url, "base", self.members.names, self.vocabulary)
        answers: list[Answered] = []
        async with open_session() as session:
            await replay_at_its_times(session, target, self.members.asked_by(trace), on_answer=answers.append)
        for answered in answers:
            if error := answered.timing.error:
                raise JDLoRAError(f"a request for {answered.timing.model} failed: {error} {answered.timing.detail}")
        wait_until_idle(server.url)
        return answers

    def _counters(self, server: Server) -> dict[str, float]:
        counters = read_counters(fetch_page(server.url))
        return {figure: value_of(counters, sample) for figure, sample in COUNTERS.items()}


def _ttft(answered: Answered) -> float:
    ttft = answered.timing.ttft
    assert ttft is not None, "an answer without an error has a first token"
    return ttft


def take_turns(bench: Bench, servers: dict[bool, Server], rounds: int, told: Callable[[str], None]) -> list[Turn]:
    """Turns of a server with cluster order off and of one with it on; `told` what comes next."""
    turns = []
    for round_ in range(rounds):
        # There and back: what follows what is not always the same.
        for order in (False, True) if round_ % 2 == 0 else (True, False):
            told(f"round {round_ + 1}, cluster order {word_of(order)}")
            turns.append(bench.take_turn(servers[order], order, round_))
    return turns


def record_of(bench: Bench, turns: list[Turn], age_cap: float) -> dict[str, Any]:
    given = vars(bench.given)
    settings = {name: value for name, value in given.items() if name not in ("json", "results", "model", "rounds")}
    settings |= {"model": bench.model.name, "dtype": bench.dtype, "age_cap": age_cap, "rare": RARE}
    return {
        **conditions(),
        **settings,
        "rows": [turn.as_json(bench.clusters) for turn in turns],
        "summary": {word_of(order): summary_of(turns, order, bench.clusters) for order in (False, True)},
    }


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder (default: SmolLM2 135M)")
    parser.add_argument("--dtype", help="of the model (default: what the processor is fast in)")
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--base-slots", type=int, default=8)
    parser.add_argument("--members", type=int, default=4, help="adapters of each cluster, in the mean")
    parser.add_argument("--rank", type=int, default=32, help="of the bases")
    parser.add_argument("--targets", choices=TARGETS, default="linear")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200, help="of each turn")
    parser.add_argument("--rate", type=float, default=20, help="requests a second (Poisson)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the clusters' popularity")
    parser.add_argument("--prompt", type=int, default=16, help="mean tokens")
    parser.add_argument("--answer", type=int, default=16, help="mean tokens")
    parser.add_argument(
        "--age-cap", type=float, nargs="+", default=AGE_CAPS, help="seconds; a server with the order on for each"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the records, not the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    stop_on_termination()
    records = []
    turns_and_starts = 1 + len(given.age_cap) * (2 * given.rounds + 1)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("writing the collection", total=1 + turns_and_starts)
        bench = Bench(given, Path(folder))

        def told(what: str) -> None:
            progress.update(task, advance=1, description=what)

        told("starting the server with cluster order off")
        with bench.serving(False, AGE_CAP) as first_come:
            for age_cap in given.age_cap:
                told(f"starting the server with cluster order on, age cap {age_cap:g} s")
                with bench.serving(True, age_cap) as ordered:
                    turns = take_turns(bench, {False: first_come, True: ordered}, given.rounds, told)
                records.append(record_of(bench, turns, age_cap))
                append_line(given.results, records[-1])
    if given.json:
        print(json.dumps(records))
    else:
        Console(width=120).print(shown(records))


if __name__ == "__main__":
    main()
