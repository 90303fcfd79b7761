"""Throughput side by side: base, stock vLLM's multi-LoRA, uncompressed and compressed adapters here (`make bench`).

Every row is a real vLLM engine in a process of its own. The engines are started first and then take turns on the same
prompts, round after round, so that a machine whose speed drifts slows all of them alike; what is reported are medians
over the rounds, and ratios within a round. Each request of a batch names another adapter where there are enough, drawn
anew in every round. The rows run in groups of few engines, each with the base in it (`bench_rows.groups_of`): many
engines in memory slow each other down, and not evenly. Stock vLLM is so slow that it takes part in fewer rounds. One
JSON line is appended to `results/bench.jsonl`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_results
from bench_conditions import ROOT, add_model_flags, conditions, default_dtype, default_model
from bench_engine import Engine, EngineDied, Workload, stop_on_termination
from bench_report import RATIOS, Group, as_json, goals_of, print_tables, ratios_of
from bench_rows import RANK, ROWS, Row, Workplace, groups_of
from plot_bench import PICTURE, RESULTS, newest, plot
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_jdlora.errors import JDLoRAError


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    return [
        Workload("decode", args.batch, 64, args.output_tokens),
        Workload("prefill", min(8, args.batch), 512, 1),
        Workload("prefill of one", 1, 512, 1, repeat=1 if args.quick else 4),
    ]


def measured(
    rows: list[Row], place: Workplace, workloads: list[Workload], args: argparse.Namespace, failed: dict[str, str]
) -> Group:
    """Start the engines of a group, let them take turns, and stop them. Rows whose engine dies are left out."""
    group = Group([])
    engines: list[tuple[Row, Engine]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:

        def give_up(row: Row, error: Exception) -> None:
            progress.console.print(f"({row.key}) is left out: {error}", markup=False)
            failed[row.key] = str(error)

        try:
            task = progress.add_task("starting", total=len(rows))
            for row in rows:
                progress.update(task, description=f"starting ({row.key})")
                # One at a time: the machine is small, and each start compiles or packs weights.
                try:
                    spec, row = place.engine(row)
                    engines.append((row, Engine(spec, place.scratch / f"{row.key}.log")))
                    engines[-1][1].wait_ready()
                except JDLoRAError as error:
                    give_up(row, error)
                except EngineDied as error:
                    engines.pop()[1].stop()
                    give_up(row, error)
                progress.advance(task)
            group.threads = engines[0][1].threads if engines else 0
            group.rows = [row for row, _ in engines]
            total = sum(args.stock_rounds if row.slow else args.rounds for row in group.rows) + len(group.rows)
            task = progress.add_task("rounds", total=total * len(workloads))
            for round_ in range(-1, args.rounds):
                for workload in workloads:
                    # There and back: what follows what is not always the same.
                    for row, engine in list(engines if round_ % 2 else reversed(engines)):
                        if row.slow and round_ >= args.stock_rounds:
                            continue
                        progress.update(
                            task, description=f"round {round_ + 1}/{args.rounds}, {workload.name}, ({row.key})"
                        )
                        try:
                            if round_ < 0:
                                engine.run(_warm_up(workload, row), 0)
                            else:
                                turn = engine.run(workload, round_ + 1)
                                group.add(round_, args.rounds, row, workload, turn)
                        except EngineDied as error:
                            engines.remove((row, engine))
                            engine.stop()
                            give_up(row, error)
                        progress.advance(task)
        finally:
            for row, engine in engines:
                group.memory_bytes[row.key] = engine.memory_bytes
                engine.stop()
    return group


def _warm_up(workload: Workload, row: Row) -> Workload:
    """Full batches once, so that all that is made for a shape is made; of the slow rows a request or two."""
    if row.slow:
        return replace(workload, requests=1, output_tokens=min(2, workload.output_tokens), repeat=1)
    return replace(workload, output_tokens=min(8, workload.output_tokens), repeat=1)


def main() -> None:
    known = [row.key for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=known, metavar="ROW", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stock-rounds", type=int, default=2, help="rounds that stock vLLM takes part in")
    parser.add_argument("--output-tokens", type=int, default=64, help="of each request in decode")
    parser.add_argument("--batch", type=int, default=32, help="concurrent requests in decode")
    parser.add_argument("--quick", action="store_true", help="one round of 8 tokens each: does it run?")
    parser.add_argument("--adapters", type=Path, default=ROOT / "demo" / "adapters", help="PEFT adapters of (c8), (d8)")
    add_model_flags(parser)
    bench_results.add_flags(parser, RESULTS, PICTURE)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.stock_rounds, args.output_tokens = 1, 1, min(args.output_tokens, 8)
    stop_on_termination()

    model = args.model or default_model()
    dtype = args.dtype or default_dtype()
    workloads = workloads_of(args)
    rows = [row for row in ROWS if not args.rows or row.key in args.rows]
    load_before = os.getloadavg()
    groups: list[Group] = []
    failed: dict[str, str] = {}
    for members in groups_of(rows, RATIOS):
        with tempfile.TemporaryDirectory(prefix="jdlora-bench-") as scratch:
            place = Workplace(Path(scratch), model, args.adapters, dtype, args.batch)
            groups.append(measured(members, place, workloads, args, failed))

    ratios = ratios_of(groups)
    print_tables(groups, workloads, ratios)
    record: dict[str, Any] = {
        **conditions(),
        "dtype": dtype,
        "model": model.name,
        "rank": RANK,
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "quick": args.quick,
        "rounds": args.rounds,
        "stock_rounds": args.stock_rounds,
        "workloads": [asdict(w) for w in workloads],
        "rows": {row.key: asdict(row) for group in groups for row in group.rows},
        "groups": [as_json(group) for group in groups],
        "failed": failed,
        "ratios": ratios,
        "goals": {
            goal.ratio: {"goal": goal.text, **figures, "met": all(map(goal.met, figures.values()))}
            for goal, figures in goals_of(ratios)
        },
    }
    bench_results.keep(record, args, lambda picture: plot(newest(args.results), picture))


if __name__ == "__main__":
    main()
