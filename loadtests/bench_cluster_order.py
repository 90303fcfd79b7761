"""Cluster order on and off on real engines whose base slots are scarce (`make bench-scheduler`).

Two vLLM engines serve one synthetic collection of a real model, which differ in `cluster_order` alone, and take turns
with the same trace of `workload.py`: the same arrivals by the clock on the wall, clusters and lengths. Told are
requests a second from the first arrival to the last answer, bases brought to the device, and the time to the first
token, of all requests and of the rarest clusters. One JSON line goes to `results/bench_cluster_order.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_conditions import conditions, default_dtype, default_model
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from synthetic_collections import ATTENTION, LINEAR, write_collection
from wait_figures import wait_figures
from workload import Trace, TrafficSpec, generate

from vllm_jdlora.evaluation.records import append_line
from vllm_jdlora.serving.options import AGE_CAP

RESULTS = Path(__file__).parent / "results" / "bench_cluster_order.jsonl"
TARGETS = {"attention": ATTENTION, "linear": LINEAR}


@dataclass(frozen=True)
class EngineSpec:
    """One engine: a model and a collection, and how many clusters and requests a batch may hold."""

    model: str
    collection: str
    dtype: str
    base_slots: int
    max_num_seqs: int
    age_cap: float
    cluster_order: bool


class _Served:
    """An engine's process: the engine, and the adapters of each cluster that has any."""

    engine: Any
    by_cluster: list[list[Any]]
    turns = 0


def start(spec: EngineSpec) -> None:
    """Make this process an engine."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM

    from vllm_jdlora.collection import Collection
    from vllm_jdlora.serving.requests import lora_requests

    options = {name: getattr(spec, name) for name in ("collection", "base_slots", "age_cap", "cluster_order")}
    llm = LLM(
        spec.model,
        skip_tokenizer_init=True,
        dtype=spec.dtype,
        max_model_len=256,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        additional_config={"jdlora": options},
    )
    collection = Collection.open(spec.collection, verify=False)
    requests = lora_requests(collection)
    _Served.engine = llm
    by_cluster: dict[int, list[Any]] = {}
    for entry in collection.manifest.adapters:
        by_cluster.setdefault(entry.cluster, []).append(requests[entry.name])
    _Served.by_cluster = [by_cluster[cluster] for cluster in sorted(by_cluster)]


def take_turn(traffic: TrafficSpec) -> dict[str, Any]:
    """Serve a trace; what came of it. "Adapters" of the trace are clusters, the rarest last."""
    engine, trace = _Served.engine.llm_engine, generate(traffic)
    _Served.turns += 1
    before = _Served.engine.collective_rpc("jdlora_statistics")[0]
    first, steps, seconds = _serve(engine, trace)
    after = _Served.engine.collective_rpc("jdlora_statistics")[0]
    grown = {name: after[name] - before[name] for name in ("base_swaps", "base_bytes")}
    waits = [(trace.requests[i].adapter, wait) for i, wait in first.items()]
    return {
        "requests_per_second": round(len(trace.requests) / seconds, 3),
        "seconds": round(seconds, 3),
        "steps": steps,
        **grown,
        "swaps_per_step": round(grown["base_swaps"] / steps, 4),
        **wait_figures(waits, traffic.adapters, "first_token"),
    }


def _serve(engine: Any, trace: Trace) -> tuple[dict[int, float], int, float]:
    """Seconds from each request's arrival to its first token, steps, and seconds from the first arrival to the end."""
    from vllm import SamplingParams

    tokens = engine.model_config.get_vocab_size()
    first: dict[int, float] = {}
    steps = sent = 0
    start = time.perf_counter() - trace.requests[0].at
    while sent < len(trace.requests) or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while sent < len(trace.requests) and trace.requests[sent].at <= now:
            asked = trace.requests[sent]
            members = _Served.by_cluster[asked.adapter]
            engine.add_request(
                str(sent),
                {"prompt_token_ids": trace.prompt_ids(sent, tokens, _Served.turns)},
                SamplingParams(temperature=0, max_tokens=asked.output_tokens, ignore_eos=True, detokenize=False),
                lora_request=members[sent % len(members)],
            )
            sent += 1
        if not engine.has_unfinished_requests():
            time.sleep(trace.requests[sent].at - now)
            continue
        outputs = engine.step()
        steps += 1
        now = time.perf_counter() - start
        for output in outputs:
            number = int(output.request_id)
            first.setdefault(number, now - trace.requests[number].at)
    return first, steps, time.perf_counter() - start - trace.requests[0].at


def compare(given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each turn of each engine."""
    model = given.model or default_model()
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("writing the collection", total=3 + 2 * given.rounds)
        adapters, rank = given.clusters * given.members, given.rank
        collection = write_collection(
            folder / "c", model, TARGETS[given.targets], adapters=adapters, clusters=given.clusters, rank=rank
        )
        progress.advance(task)
        traffic = TrafficSpec(
            len({entry.cluster for entry in collection.manifest.adapters}),
            given.requests,
            arrivals=f"gamma:{given.rate:g}:1",
            popularity=f"zipf:{given.zipf:g}",
            prompt=(max(1, given.prompt // 2), given.prompt + given.prompt // 2 + 1),
            output=(max(1, given.answer // 2), given.answer + given.answer // 2 + 1),
            seed=given.seed,
        )
        warm_up = TrafficSpec(traffic.adapters, 8, prompt=(8, 9), output=(4, 5))
        engines = {}
        for order in (False, True):
            progress.update(task, description=f"starting the engine with cluster order {'on' if order else 'off'}")
            spec = EngineSpec(
                str(model),
                str(folder / "c"),
                given.dtype or default_dtype(),
                given.base_slots,
                given.max_num_seqs,
                given.age_cap,
                order,
            )
            engines[order] = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (spec,))
            # The first steps of an engine are slow.
            engines[order].submit(take_turn, warm_up).result()
            progress.advance(task)
        for round_ in range(given.rounds):
            for order, engine in engines.items():
                progress.update(task, description=f"round {round_ + 1}, cluster order {'on' if order else 'off'}")
                found = engine.submit(take_turn, traffic.with_seed(given.seed + round_)).result()
                rows.append({"cluster_order": order, "round": round_ + 1, **found})
                progress.advance(task)
        for engine in engines.values():
            engine.shutdown()
    return rows


def shown(rows: list[dict[str, Any]]) -> Table:
    table = Table("cluster order", "req/s", "bases swapped", "in a step", "first token p50, s", "p99", "rarest p99")
    columns = ("requests_per_second", "base_swaps", "swaps_per_step", "first_token_p50", "first_token_p99")
    for order in (False, True):
        turns = [row for row in rows if row["cluster_order"] == order]
        figures = [statistics.median(row[name] for row in turns) for name in columns]
        rare = [row["rare_first_token_p99"] for row in turns if row["rare_first_token_p99"] is not None]
        worst = f"{statistics.median(rare):.3g}" if rare else "–"
        table.add_row("on" if order else "off", *(f"{value:.3g}" for value in figures), worst)
    table.caption = "medians over the rounds"
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder (default: SmolLM2 135M)")
    parser.add_argument("--dtype", help="of the model (default: what the processor is fast in)")
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--base-slots", type=int, default=8)
    parser.add_argument("--members", type=int, default=4, help="adapters of each cluster, in the mean")
    parser.add_argument("--rank", type=int, default=32, help="of the bases")
    parser.add_argument("--targets", choices=TARGETS, default="linear")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=20, help="requests a second (Poisson)")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the clusters' popularity")
    parser.add_argument("--prompt", type=int, default=16, help="mean tokens")
    parser.add_argument("--answer", type=int, default=16, help="mean tokens")
    parser.add_argument("--age-cap", type=float, default=AGE_CAP, help="seconds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(given, Path(folder))
    settings = {k: v for k, v in vars(given).items() if k not in ("json", "results", "model", "rounds")}
    settings |= {"model": (given.model or default_model()).name, "dtype": given.dtype or default_dtype()}
    record = {**conditions(), "threads": len(os.sched_getaffinity(0)), **settings, "rows": rows}
    append_line(given.results, record)
    if given.json:
        print(json.dumps(record))
    else:
        Console(width=110).print(shown(rows))


if __name__ == "__main__":
    main()
