"""Does a server cost more when it knows more adapters? 100, 1,000, 10,000 and 100,000 of them (`make bench-scale`).

Synthetic collections of the base model (rank 16, 8 clusters, q, k, v) are served by real `vllm serve` processes over
HTTP. Serving: the smallest size stays up and each other one takes turns with it, round after round, on requests uniform
over all of its adapters, so that ratios come from the same minutes. Before that, adapters that were never asked for are
asked beside familiar ones, one request at a time; first with their Σ in the page cache, then dropped from it. Starting:
every configuration in turn, and the base model without LoRA, each after a first start that filled vLLM's compile cache.
One JSON line is appended to `results/bench_scale.jsonl`. A run may measure some sizes, or only one of the two
(`--rounds 0`, `--starts 0`); the picture shows the newest figures of each size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import bench_results
from bench_conditions import add_model_flags, available_bytes, conditions, default_dtype, default_model
from bench_engine import stop_on_termination
from lora_step_clock import EXTENSION
from openai_client import open_session
from plot_scale import PICTURE, RESULTS, newest, plot
from process_tree import child_of_port, cpu_seconds, memory_by_process
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scale_report import DISK, PAGE_CACHE, Served, StartUps, Traffic, goals_of, print_tables
from scale_server import Running
from scale_traffic import Ask, Shape, cold_beside_warm, uniform
from synthetic_collections import ATTENTION, model_slices, write_collection

from vllm_jdlora.collection import Collection
from vllm_jdlora.demo.server import Server
from vllm_jdlora.errors import JDLoRAError

RANK, CLUSTERS = 16, 8
SIZES = (100, 1_000, 10_000, 100_000)
_FAMILIAR = 32
_GIBIBYTES_PER_SERVER = 2.0
_SLOT_GIBIBYTES = 2.0


class Bench:
    """The servers of one run and how they are measured."""

    def __init__(self, args: argparse.Namespace, model: Path, scratch: Path, progress: Progress):
        self.args, self.model, self.scratch, self.progress = args, model, scratch, progress
        self.dtype = args.dtype or default_dtype()
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.shape = Shape(args.prompt_tokens, args.output_tokens, vocabulary)
        self.collections: dict[int, Collection] = {}

    def write_collections(self) -> None:
        slices = len(model_slices(self.model, ATTENTION))
        needed = sum(self.args.sizes) * slices * RANK**2 * 2
        if (free := shutil.disk_usage(self.scratch).free) < 1.2 * needed:
            raise JDLoRAError(f"{self.scratch} has {free >> 30} GiB free and the collections take {needed >> 30}")
        task = self.progress.add_task("collections", total=sum(self.args.sizes))
        for adapters in self.args.sizes:
            self.progress.update(task, description=f"writing {adapters:,} adapters")
            self.collections[adapters] = write_collection(
                self.scratch / f"collection-{adapters}",
                self.model,
                ATTENTION,
                adapters=adapters,
                clusters=CLUSTERS,
                rank=RANK,
            )
            self.progress.advance(task, adapters)

    @contextmanager
    def running(self, adapters: int | None, starts: StartUps | None = None) -> Iterator[Running]:
        """The server of one size (None: the base model without LoRA)."""
        arguments = [
            str(self.model),
            f"--dtype={self.dtype}",
            "--max-model-len=512",
            f"--max-num-seqs={self.args.concurrency}",
            f"--kv-cache-memory-bytes={256 << 20}",
            "--served-model-name=base",
        ]
        names = []
        if adapters is not None:
            collection = self.collections[adapters]
            names = [entry.name for entry in collection.manifest.adapters]
            arguments += ["--lora-compression=jd", f"--lora-collection={collection.path}"]
            arguments += [f"--worker-extension-cls={EXTENSION}"]
        here = str(Path(__file__).parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        server = Server(
            arguments,
            env={"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": path},
            timeout=900,
            log_path=self.scratch / f"serve-{adapters or 'base'}.log",
        )
        begin = time.monotonic()
        try:
            server.start()
            seconds = time.monotonic() - begin
            if starts is not None:
                starts.seconds.append(seconds)
                starts.cpu_seconds.append(cpu_seconds(child_of_port(server.port)))
            yield Running(server, names)
        finally:
            server.stop()

    # --- serving --------------------------------------------------------------------------------------------------

    def serve(self) -> list[Served]:
        """Every size beside the smallest one; the smallest beside a second server of itself, which shows the noise."""
        smallest, *larger = self.args.sizes
        found = []
        task = self.progress.add_task("servers", total=len(larger) + 2)
        self.progress.update(task, description=f"starting {smallest:,}")
        with self.running(smallest) as reference:
            self.progress.advance(task)
            for adapters in self.args.sizes:
                self.progress.update(task, description=f"starting {adapters:,}")
                needed = _GIBIBYTES_PER_SERVER + _SLOT_GIBIBYTES * (adapters > smallest)
                if available_bytes() / 2**30 < needed:
                    raise JDLoRAError(f"too little memory for a second server: {needed:.0f} GiB must be free")
                with self.running(adapters) as own:
                    log_lines = len(own.server.log_path.read_text(errors="replace").splitlines())
                    found.append(asyncio.run(self._taken_turns(adapters, own, reference, log_lines)))
                self.progress.advance(task)
        return found

    async def _taken_turns(self, adapters: int, own: Running, reference: Running, log_lines: int) -> Served:
        traffic = {id(own): Traffic(), id(reference): Traffic()}
        cold: dict[str, dict[str, list[float]]] = {}
        async with open_session() as session:
            if adapters > self.args.sizes[0]:
                for where in (PAGE_CACHE, DISK):
                    cold[where] = await self._cold(session, own, adapters, where)
            task = self.progress.add_task(f"{adapters:,} rounds", total=2 * (self.args.rounds + 1))
            for round_ in range(-1, self.args.rounds):
                # There and back: what follows what is not always the same.
                for side in (own, reference) if round_ % 2 else (reference, own):
                    # Other prompts in every round with every server: none may find its own in the prefix cache.
                    asks = uniform(side.names, self.shape, self.args.requests, seed=adapters + round_ + 1)
                    if round_ == 0:
                        side.call("start_lora_clock")
                    answers, seconds = await side.ask(session, asks, self.args.concurrency, lambda: None)
                    if round_ >= 0:  # the first one warms up
                        traffic[id(side)].tokens_per_second.append(len(asks) * self.shape.answer / seconds)
                        traffic[id(side)].ttft += [ttft for _, ttft in answers]
                    self.progress.advance(task)
        for side in (own, reference):
            traffic[id(side)].host_microseconds = side.call("read_lora_clock")["microseconds"]
        return Served(
            adapters=adapters,
            own=traffic[id(own)],
            reference=traffic[id(reference)],
            cold=cold,
            listing=own.listing(),
            memory=memory_by_process(child_of_port(own.server.port)),
            statistics=own.call("jdlora_statistics"),
            metrics_lines=own.metrics_lines(),
            log_lines=log_lines,
        )

    async def _cold(
        self, session: aiohttp.ClientSession, own: Running, adapters: int, where: str
    ) -> dict[str, list[float]]:
        """Seconds to the first token of adapters that were never asked for and of familiar ones, one at a time.

        The cold ones are of the upper half: where not all Σ fit in the slots, those are not resident.
        """
        familiar = own.names[: min(_FAMILIAR, adapters // 2)]
        upper = [name for name in own.names[adapters // 2 :] if name not in own.asked]
        count = min(self.args.cold, adapters // 4)  # as many are left for the other place
        never = upper[:: len(upper) // count][:count]
        first_token = replace(self.shape, answer=1)
        asks = cold_beside_warm(never, familiar, first_token, seed=(1 << 20) + len(own.asked))
        task = self.progress.add_task(f"{adapters:,} cold, Σ in {where}", total=len(asks))
        await own.ask(session, [Ask(name, [7] * 8, 1) for name in familiar], 1, lambda: None)
        if where == DISK:
            _drop_from_page_cache(self.collections[adapters])
        answers, _ = await own.ask(session, asks, 1, lambda: self.progress.advance(task))
        found: dict[str, list[float]] = {"cold": [], "warm": []}
        for ask, ttft in answers:
            found[ask.kind].append(ttft)
        return found

    # --- starting -------------------------------------------------------------------------------------------------

    def start(self) -> dict[int | None, StartUps]:
        """Every configuration in turn, in every round."""
        found: dict[int | None, StartUps] = {adapters: StartUps() for adapters in (None, *self.args.sizes)}
        uncounted = [adapters for adapters in found if adapters is None or not self.args.rounds]
        task = self.progress.add_task("starts", total=len(uncounted) + self.args.starts * len(found))
        for adapters in uncounted:
            self.progress.update(task, description="filling caches")
            with self.running(adapters):
                self.progress.advance(task)
        for round_ in range(self.args.starts):
            for adapters in list(found) if round_ % 2 else list(reversed(found)):
                self.progress.update(task, description=f"starting {'base' if adapters is None else f'{adapters:,}'}")
                with self.running(adapters, found[adapters]):
                    self.progress.advance(task)
        return found


def _drop_from_page_cache(collection: Collection) -> None:
    """Pages of Σ that no process has touched are read from the disk again; the others stay."""
    for name in collection.manifest.files:
        descriptor = os.open(collection.path / name, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of adapters")
    parser.add_argument("--rounds", type=int, default=10, help="0: do not serve")
    parser.add_argument("--requests", type=int, default=96, help="of each server in each round")
    parser.add_argument("--concurrency", type=int, default=32, help="clients at the same time")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--cold", type=int, default=2000, help="adapters never asked for, and as many familiar ones")
    parser.add_argument(
        "--starts", type=int, default=3, help="of each configuration, after one that fills caches; or 0"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does it run?")
    add_model_flags(parser)
    parser.add_argument("--scratch", type=Path, help="folder for collections and logs, 6 GB; default: a temporary one")
    bench_results.add_flags(parser, RESULTS, PICTURE)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.requests, args.cold = [20, 200], 8, 20
        args.rounds, args.starts = min(args.rounds, 1), min(args.starts, 1)
    args.sizes = sorted(set(args.sizes))
    if args.sizes[0] < 4:
        parser.error("--sizes are at least 4")
    stop_on_termination()

    model = args.model or default_model()
    load_before = os.getloadavg()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="jdlora-scale-", dir=args.scratch) as scratch,
        Progress(*columns) as progress,
    ):
        bench = Bench(args, model, Path(scratch), progress)
        bench.write_collections()
        served = bench.serve() if args.rounds else []
        starts = bench.start() if args.starts else {}
    goals = goals_of(served, starts)
    print_tables(served, starts, goals)
    record = {
        **conditions(),
        "dtype": bench.dtype,
        "model": model.name,
        "rank": RANK,
        "clusters": CLUSTERS,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "quick": args.quick,
        "rounds": args.rounds,
        "requests": args.requests,
        "concurrency": args.concurrency,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "served": [s.as_json() for s in served],
        "starts": {"base" if n is None else str(n): s.as_json() for n, s in starts.items()},
        "goals": [{"goal": g.text, "figure": round(g.figure, 3), "met": g.met} for g in goals],
    }
    bench_results.keep(record, args, lambda picture: plot(newest(args.results, quick=args.quick), picture))


if __name__ == "__main__":
    main()
