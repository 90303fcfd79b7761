"""Cluster-aware admission beside first come, first served, where base slots are scarce (`make bench-scheduler`).

The real scheduler classes run; what a step costs is a model: seconds for a step and for each token in it, and for each
cluster whose bases are not on the device their bytes over the bandwidth (the least recently used make room, as in a
worker). Traffic is that of `workload.py`, which draws a cluster for each request, and the clock is the model's: the
same seed gives the same figures on any machine. Beside them stands what is measured: the host time of `schedule()`
while thousands of requests are blocked. One JSON line goes to `results/simulate_scheduler.jsonl`.

`bench_cluster_order.py` makes the comparison on real engines.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench_conditions import conditions
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scheduler_host_time import host_rows, shown_host
from wait_figures import wait_figures
from workload import TraceRequest, TrafficSpec, generate

from vllm_jdlora.evaluation.records import append_line
from vllm_jdlora.serving.options import AGE_CAP

RESULTS = Path(__file__).parent / "results" / "simulate_scheduler.jsonl"


@dataclass(frozen=True)
class Costs:
    """Seconds of a step, of a token in it, and of a cluster that is brought to the device: its bytes/bandwidth."""

    step_seconds: float
    token_seconds: float
    base_bytes: float
    bandwidth: float

    def of_step(self, tokens: int, swaps: int) -> float:
        return self.step_seconds + tokens * self.token_seconds + swaps * self.base_bytes / self.bandwidth


@dataclass(frozen=True)
class Policy:
    """A scheduler to compare: None for no limit on clusters, as where all bases are resident."""

    name: str
    base_slots: int | None
    age_cap: float
    cluster_order: bool


def policies(base_slots: int, age_cap: float) -> list[Policy]:
    return [
        Policy("first come, limits only", base_slots, math.inf, False),
        Policy("first come, age cap", base_slots, age_cap, False),
        Policy("cluster order, age cap", base_slots, age_cap, True),
        Policy("all bases resident", None, age_cap, False),
    ]


def simulate(policy: Policy, traffic: TrafficSpec, costs: Costs, *, members: int, max_num_seqs: int) -> dict[str, Any]:
    """Run the scheduler to the last answer; what it did, in figures.

    Args:
        traffic: whose "adapters" are clusters.
        members: adapters of each cluster, which take turns.
    """
    from lone_scheduler import compressed_adapter, finish_step, lone_scheduler, new_request, slot_options

    from vllm_jdlora.serving.scheduler import JDScheduler

    now = 0.0
    simulated = type("SimulatedScheduler", (JDScheduler,), {"clock": staticmethod(lambda: now)})
    options = slot_options(
        base_slots=policy.base_slots,
        age_cap=policy.age_cap,
        cluster_order=policy.cluster_order,
    )
    with tempfile.TemporaryDirectory() as folder:
        scheduler = lone_scheduler(Path(folder), options, max_num_seqs=max_num_seqs, make=simulated)
    arrivals = generate(traffic).requests
    arrival_of: dict[str, TraceRequest] = {}
    waits: dict[str, float] = {}
    ended: dict[str, float] = {}
    resident: dict[int, None] = {}
    pending = iter(arrivals)
    coming = next(pending, None)
    steps = swaps = touched = running = 0
    while coming is not None or scheduler.has_unfinished_requests():
        if coming is not None and not scheduler.has_unfinished_requests():
            now = max(now, coming.at)
        while coming is not None and coming.at <= now:
            adapter = coming.adapter * members + len(arrival_of) % members
            request = new_request(
                compressed_adapter(adapter, cluster=coming.adapter),
                prompt=coming.prompt_tokens,
                answer=coming.output_tokens,
            )
            arrival_of[request.request_id] = coming
            scheduler.add_request(request)
            coming = next(pending, None)
        output = scheduler.schedule()
        for new in output.scheduled_new_reqs:
            waits[new.req_id] = now - arrival_of[new.req_id].at
        clusters = {arrival_of[name].adapter for name in output.num_scheduled_tokens}
        missing = len(clusters - resident.keys()) if policy.base_slots else 0
        for cluster in clusters:
            resident.pop(cluster, None)
            resident[cluster] = None
        while policy.base_slots and len(resident) > policy.base_slots:
            del resident[next(iter(resident))]
        now += costs.of_step(output.total_num_scheduled_tokens, missing)
        steps, swaps, touched = steps + 1, swaps + missing, touched + len(clusters)
        running += len(output.num_scheduled_tokens)
        finish_step(scheduler, output)
        ended.update({name: now for name in output.num_scheduled_tokens if name not in scheduler.requests})
    last = arrivals[-1].at
    in_time = [name for name, end in ended.items() if end <= last]
    return {
        "policy": policy.name,
        "requests_per_second": round(len(in_time) / last, 2),
        "tokens_per_second": round(sum(arrival_of[name].output_tokens for name in in_time) / last, 1),
        "seconds_to_last_answer": round(now, 3),
        "steps": steps,
        "swaps_per_step": round(swaps / steps, 4),
        "clusters_per_step": round(touched / steps, 2),
        "requests_per_step": round(running / steps, 1),
        **wait_figures([(arrival_of[name].adapter, wait) for name, wait in waits.items()], traffic.adapters),
    }


def shown(rows: list[dict[str, Any]]) -> Table:
    waits = {"p50": "wait_p50", "p99": "wait_p99", "rare p50": "rare_wait_p50", "rare p99": "rare_wait_p99"}
    table = Table("at once", "req/s asked", "order", "req/s", "swaps", "clusters", "requests", *waits)
    for row in rows:
        table.add_row(
            str(row["max_num_seqs"]),
            f"{row['rate']:g}",
            row["policy"],
            f"{row['requests_per_second']:.1f}",
            f"{row['swaps_per_step']:.3f}",
            f"{row['clusters_per_step']:.1f}",
            f"{row['requests_per_step']:.0f}",
            *("–" if row[name] is None else f"{row[name]:.2f}" for name in waits.values()),
        )
    table.caption = "swaps, clusters, requests: in a step; waits in seconds from arrival to admission"
    return table


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[20, 40, 60, 80], help="requests a second")
    parser.add_argument("--seconds", type=float, default=30, help="of arrivals at each rate")
    parser.add_argument("--clusters", type=int, default=512)
    parser.add_argument("--base-slots", type=int, default=16)
    parser.add_argument("--members", type=int, default=64, help="adapters of each cluster")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the clusters' popularity")
    parser.add_argument(
        "--variation", type=float, default=1.0, help="of times between arrivals; 1: Poisson, else Gamma"
    )
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens")
    parser.add_argument("--answer", type=int, default=64, help="mean tokens")
    parser.add_argument("--max-num-seqs", type=int, nargs="+", default=[32, 256], help="requests that run at once")
    parser.add_argument("--age-cap", type=float, default=AGE_CAP, help="seconds")
    parser.add_argument("--step-seconds", type=float, default=8e-3, help="of a step without tokens")
    parser.add_argument("--token-seconds", type=float, default=2e-5, help="of each token in a step")
    parser.add_argument("--base-bytes", type=float, default=84e6, help="of one cluster's bases (8B, R 16, all linear)")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s from host to device")
    parser.add_argument("--waiting", type=int, default=5000, help="blocked requests while a step's host time is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the record, not the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="picture of the rates (svg, png)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    costs = Costs(given.step_seconds, given.token_seconds, given.base_bytes, given.bandwidth)
    lengths = {
        name: (max(1, mean // 2), mean + mean // 2 + 1)
        for name, mean in (("prompt", given.prompt), ("output", given.answer))
    }
    traffic = TrafficSpec(given.clusters, 1, popularity=f"zipf:{given.zipf:g}", seed=given.seed, **lengths)
    compared = policies(given.base_slots, given.age_cap)
    runs = [(seqs, rate, policy) for seqs in given.max_num_seqs for rate in given.rates for policy in compared]
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("simulating", total=len(runs))
        for seqs, rate, policy in runs:
            progress.update(task, description=f"{rate:g} requests/s, {seqs} at once, {policy.name}")
            count, arrivals = max(1, int(rate * given.seconds)), f"gamma:{rate:g}:{given.variation:g}"
            asked = replace(traffic, requests=count, arrivals=arrivals)
            found = simulate(policy, asked, costs, members=given.members, max_num_seqs=seqs)
            rows.append({"max_num_seqs": seqs, "rate": rate, **found})
            progress.advance(task)
    record = {
        **conditions(),
        "costs": asdict(costs),
        "traffic": {name: value for name, value in asdict(traffic).items() if name not in ("requests", "arrivals")},
        "variation": given.variation,
        "seconds": given.seconds,
        "members": given.members,
        "base_slots": given.base_slots,
        "age_cap": given.age_cap,
        "rows": rows,
        "host": host_rows(given.waiting),
    }
    append_line(given.results, record)
    if given.plot:
        from plot_scheduler import plot

        plot(record, given.plot)
    if given.json:
        print(json.dumps(record))
    else:
        Console(width=130).print(shown(rows), shown_host(record["host"]))


if __name__ == "__main__":
    main()
