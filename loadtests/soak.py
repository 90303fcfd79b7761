"""Does a server stay right, as fast and as small for half an hour of everything at once? (`make soak`)

`vllm serve` with a collection of 2,000 adapters first shows its capacity in a closed loop. Then requests come at 80 %
of it in an open loop, adapters by a power law; some clients leave in the middle of an answer or before it. Meanwhile
malformed, oversized and half sent requests arrive, unknown models are asked for, adapters are loaded, replaced and
unloaded, and the collection is reloaded, with the same bases and with others. What must hold is in `soak_verdicts.py`.

A line of JSON goes to `results/soak.jsonl`, also after Ctrl-C (of what was until then; answers are not compared with
the reference then). Exit code 1 where something did not hold, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import bench_results
from bench_conditions import default_dtype, default_model
from bench_engine import stop_on_termination
from plot_soak import PICTURE, RESULTS, plot
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from soak_adapters import BASE, CLUSTERS, SoakAdapters, write_adapters
from soak_reference import TOLERANCES, Checked, check_answers
from soak_report import print_verdicts, record_of
from soak_run import BATCH, CONTEXT, Soak, Soaked
from soak_verdicts import all_held

from vllm_jdlora.demo.server import Server

INTERRUPTED = 130
FLAT_MEMORY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""As the operator's guide has it: by default oneDNN keeps code for 1,024 shapes, and new ones take old ones' place."""


def server_arguments(args: argparse.Namespace, model: Path, adapters: SoakAdapters) -> list[str]:
    """What follows ``vllm serve``."""
    eager = ["--enforce-eager"] if args.eager else []
    return [
        str(model),
        f"--served-model-name={BASE}",
        f"--dtype={args.dtype}",
        f"--max-model-len={CONTEXT}",
        f"--max-num-seqs={BATCH}",
        f"--kv-cache-memory-bytes={256 << 20}",
        "--block-size=32",
        "--uvicorn-log-level=warning",
        "--lora-compression=jd",
        f"--lora-collection={adapters.revisions[0][0]}",
        f"--jd-scaling-slots={args.slots}",
        "--jd-max-error=0.3",
        "--max-loras=2",
        f"--jd-base-slots={args.base_slots}",
        *eager,
    ]


def check(args: argparse.Namespace, model: Path, soaked: Soaked, progress: Progress) -> Checked:
    """The sampled answers beside the reference."""
    sample = [a for a in soaked.clients.answers if a.checked and a.timing.error is None and not a.timing.left]
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    task = progress.add_task("comparing with the reference", total=len(sample))
    return check_answers(
        model,
        sample,
        soaked.clients.history,
        soaked.trace,
        vocabulary,
        TOLERANCES[args.dtype],
        lambda: progress.advance(task),
    )


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--adapters", type=int, default=2000, help="in the collection; at least 10")
    parser.add_argument("--slots", type=int, help="scaling matrices on the device; default: a quarter of the adapters")
    parser.add_argument(
        "--base-slots",
        type=int,
        default=2 * CLUSTERS,
        help=f"clusters that there is room for; fewer than two collections' {2 * CLUSTERS}: a reload to other bases "
        "lets requests wait",
    )
    parser.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    parser.add_argument("--capacity-seconds", type=float, default=90, help="of the closed loop, after a quarter more")
    parser.add_argument("--popularity", default="power:0.3", help="as in workload.py; S-LoRA's power law")
    parser.add_argument("--prompt-tokens", nargs=2, type=int, metavar=("LOW", "HIGH"), default=(16, 160))
    parser.add_argument("--output-tokens", nargs=2, type=int, metavar=("LOW", "HIGH"), default=(8, 96))
    parser.add_argument("--base-share", type=float, default=0.05, help="share of requests to the base model")
    parser.add_argument("--checked", type=int, default=500, help="answers to compare with the reference")
    parser.add_argument("--hostile", type=float, default=1.0, help="seconds between bad requests")
    parser.add_argument("--calls", type=float, default=5.0, help="seconds between calls on adapters")
    parser.add_argument("--least-reload", type=float, default=8.0, help="seconds between reloads are at least so many")
    parser.add_argument("--look", type=float, default=5.0, help="seconds between looks at memory")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--model", type=Path, help="base model folder (default: the demo's, prepared if need be)")
    parser.add_argument("--dtype", choices=list(TOLERANCES), help="default: bfloat16 where the CPU has it, or float32")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation")
    parser.add_argument("--scratch", type=Path, help="folder for adapters and the log; default: a temporary one")
    bench_results.add_flags(parser, RESULTS, PICTURE)
    args = parser.parse_args()
    if args.adapters < 10 or args.minutes <= 0 or not 0 < args.load <= 1:
        parser.error("--adapters are at least 10, --minutes more than 0, --load in (0, 1]")
    args.slots = args.slots or max(BATCH, args.adapters // 4)
    args.dtype = args.dtype or default_dtype()
    args.seconds = 60 * args.minutes
    return args


def main() -> None:
    args = parsed_arguments()
    stop_on_termination()
    model = args.model or default_model()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="jdlora-soak-", dir=args.scratch) as scratch,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("writing adapters", total=2)
        adapters = write_adapters(Path(scratch), model, args.adapters)
        progress.update(task, description="starting the server", advance=1)
        log = Path(args.scratch or tempfile.gettempdir()) / f"jdlora-soak-{os.getpid()}.log"
        server = Server(
            server_arguments(args, model, adapters),
            env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **FLAT_MEMORY},
            timeout=900,
            log_path=log,
        )
        with server:
            progress.advance(task)
            os.nice(5)  # the server first: both share the cores
            soaked = asyncio.run(Soak(args, model, adapters, server, progress).run())
        checked = None
        try:
            checked = None if soaked.interrupted else check(args, model, soaked, progress)
        except (KeyboardInterrupt, SystemExit):
            soaked = replace(soaked, interrupted=True)
    record, verdicts = record_of(args, model, soaked, checked)
    print_verdicts(verdicts, soaked)
    print(f"the server's log is {log}")
    bench_results.keep(record, args, lambda picture: plot(record, picture))
    if soaked.interrupted:
        raise SystemExit(INTERRUPTED)
    if not all_held(verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
