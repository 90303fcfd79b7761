"""`jdlora compress`: PEFT adapters of one base model into a collection."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.inspect import print_report
from vllm_jdlora.commands.terminal import positive, progress_bars
from vllm_jdlora.errors import JDLoRAError


def add_to(commands: Any) -> None:
    parser = commands.add_parser("compress", help="compress PEFT adapters of one base model into a collection")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="COLLECTION", help="folder to create")
    parser.add_argument("--method", choices=["full"], default="full", help="JD-Full: a full [R, R] matrix per adapter")
    parser.add_argument("--rank", type=positive, metavar="R", help="columns of each basis (default: the paper's rule)")
    parser.add_argument(
        "--clusters", type=_clusters, metavar="K|auto", help="groups of adapters that share bases (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the clustering's starts (default: 0)")
    parser.add_argument(
        "--max-error", type=float, metavar="E", help="keep adapters with a larger relative error uncompressed"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="on disk (default: bf16)")
    parser.add_argument("--base-model", metavar="M", help="name or folder; adapters of another model are refused")
    parser.add_argument("--skip-bad", action="store_true", help="leave out adapters that cannot be read, and list them")
    parser.add_argument("--force", action="store_true", help="replace COLLECTION if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.base_model import of_one_base_model
    from vllm_jdlora.collection.build import compress

    if args.max_error is not None and not 0 <= args.max_error <= 1:
        raise JDLoRAError(f"--max-error is a relative error between 0 and 1, not {args.max_error:g}")
    if args.output.exists() and not args.force:
        # Told now rather than after the work.
        raise JDLoRAError(f"{args.output}: exists already; choose another name or give --force to replace it")
    with progress_bars() as show:
        show("read adapters", 0, 1)
        adapters, skipped = read_adapters(args.adapters, skip_bad=args.skip_bad)
        if args.skip_bad:
            adapters, others, _ = of_one_base_model(adapters, args.base_model, skip_others=True)
            skipped = sorted([*skipped, *others])
        show("read adapters", 1, 1)
        collection = compress(
            adapters,
            args.output,
            rank=args.rank,
            clusters=args.clusters,
            seed=args.seed,
            max_error=args.max_error,
            dtype=args.dtype,
            base_model=args.base_model,
            force=args.force,
            skipped=skipped,
            progress=show,
        )
    print_report(collection, args.json)
    return 0


def _clusters(text: str) -> int | None:
    return None if text == "auto" else positive(text)
