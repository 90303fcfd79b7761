"""`jdlora export`: one compressed adapter as a PEFT adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    parser = commands.add_parser("export", help="one compressed adapter as a PEFT adapter of rank R")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="fp32", help="default: fp32")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.export import export_adapter

    collection = Collection.open(args.collection)
    export_adapter(collection, args.name, args.output, dtype=args.dtype, force=args.force)
    print(f"{args.output}: {args.name} as a PEFT adapter of rank {collection.manifest.rank}")
    return 0
