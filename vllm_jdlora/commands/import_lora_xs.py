"""`jdlora import-lora-xs`: LoRA-XS adapters as a collection, without loss."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.inspect import print_report
from vllm_jdlora.commands.terminal import progress_bars, refuse_existing


def add_to(commands: Any) -> None:
    parser = commands.add_parser("import-lora-xs", help="LoRA-XS adapters as a collection, without loss")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="FOLDER", help="LoRA-XS folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="COLLECTION", help="folder to create")
    parser.add_argument(
        "--base-model",
        metavar="M",
        help="name or folder; a folder with weights gives A and B where the adapters were saved without them",
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="fp32", help="default: fp32, no loss")
    parser.add_argument("--force", action="store_true", help="replace COLLECTION if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection.lora_xs import import_lora_xs

    refuse_existing(args.output, args.force)
    with progress_bars() as show:
        collection = import_lora_xs(
            args.adapters,
            args.output,
            dtype=args.dtype,
            base_model=args.base_model,
            force=args.force,
            progress=show,
        )
    print_report(collection, args.json)
    return 0
