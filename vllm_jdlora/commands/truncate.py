"""`jdlora truncate`: adapters cut to a lower rank."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser("truncate", help="write the nearest adapters of a lower rank, as PEFT folders")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for DIR/NAME of each")
    parser.add_argument("--rank", type=positive, required=True, metavar="R", help="of each slice, at most")
    parser.add_argument("--force", action="store_true", help="replace adapters that exist in DIR")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.evaluation.truncation import truncate_all

    adapters, _ = read_adapters(args.adapters)
    written = truncate_all(adapters, args.rank, args.output, force=args.force)
    print(f"{args.output}: {len(written)} adapters of rank {args.rank} at most")
    return 0
