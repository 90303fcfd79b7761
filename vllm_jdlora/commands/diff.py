"""`jdlora diff`: what two collections do not have in common; exit code 0 where they are the same, 1 otherwise."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import printable


def add_to(commands: Any) -> None:
    parser = commands.add_parser("diff", help="compare two collections; exit code 1 if they differ")
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.diff import diff
    from vllm_jdlora.collection.schema import METRIC_ERRORS

    a, b = Collection.open(args.a, verify=False), Collection.open(args.b, verify=False)
    found, kind = diff(a, b), METRIC_ERRORS[a.manifest.metric]
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return 0 if found.same else 1
    if found.same:
        print("the same, to the byte")
        return 0
    lines = [
        *(f"added: {name}" for name in found.added),
        *(f"removed: {name}" for name in found.removed),
        *(f"other content: {c.name}: SHA-256 {c.before[:12]} → {c.after[:12]}" for c in found.content),
        *(f"moved: {c.name}: cluster {c.before} → {c.after}" for c in found.moved),
        *(f"relative error: {c.name}: {c.before:.4f} → {c.after:.4f}" for c in found.errors),
        *(f"{kind}: {c.name}: {_error(c.before)} → {_error(c.after)}" for c in found.output_errors),
        *(f"{field}: {before} → {after}" for field, (before, after) in found.settings.items()),
        *(f"slice added: {name}" for name in found.slices_added),
        *(f"slice removed: {name}" for name in found.slices_removed),
        f"bases: {'the same' if found.same_bases else 'different'}",
    ]
    for line in lines:
        print(printable(line))
    return 1


def _error(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
