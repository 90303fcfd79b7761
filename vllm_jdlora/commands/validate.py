"""`jdlora validate`: every byte of a collection against its digests."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import printable
from vllm_jdlora.errors import JDLoRAError


def add_to(commands: Any) -> None:
    parser = commands.add_parser("validate", help="read every byte and compare digests; exit code 1 if damaged")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection

    try:
        collection = Collection.open(args.collection, verify=True)
    except JDLoRAError as error:
        if args.json:
            print(json.dumps({"valid": False, "problem": str(error)}))
        else:
            print(f"jdlora: {printable(str(error))}", file=sys.stderr)
        return 1
    n = len(collection.manifest.adapters)
    if args.json:
        print(json.dumps({"valid": True, "adapters": n, "revision": collection.manifest.revision}))
    else:
        print(f"{args.collection}: valid, {n} compressed adapters, revision {collection.manifest.revision}")
    return 0
