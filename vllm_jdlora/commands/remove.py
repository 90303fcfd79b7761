"""`jdlora remove`: adapters out of a collection."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import printable

_TRACES = "the bases were fitted with the removed adapters and still carry traces of them until a refresh"


def add_to(commands: Any) -> None:
    parser = commands.add_parser("remove", help="take adapters out of a collection (its bases stay)")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, metavar="NEW", help="folder to create (default: in place)")
    parser.add_argument("--force", action="store_true", help="replace NEW if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection.edit import remove

    done = remove(args.collection, args.names, output=args.output, force=args.force)
    revision = done.collection.manifest.revision
    if args.json:
        facts = {
            "collection": str(done.collection.path),
            "revision": revision,
            "removed": {"compressed": done.compressed, "plain": done.plain},
            "bases_carry_traces": bool(done.compressed),
        }
        print(json.dumps(facts, indent=1))
        return 0
    print(printable(f"removed: {', '.join((*done.compressed, *done.plain))}"))
    if done.compressed:
        print(_TRACES)
    print(printable(f"{done.collection.path}: revision {revision}"))
    return 0
