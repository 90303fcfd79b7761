"""`jdlora inspect`: sizes, clusters and errors of a collection, and the report that other commands print too."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.terminal import printable, readable_bytes

if TYPE_CHECKING:
    from vllm_jdlora.collection import Collection


def add_to(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="sizes, clusters and the error of each adapter")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection

    print_report(Collection.open(args.collection, verify=False), args.json)
    return 0


def summary(collection: Collection) -> dict[str, Any]:
    """What `inspect --json` prints: the manifest, sizes in bytes, and the errors beside every ratio."""
    manifest = collection.manifest
    errors = [a.relative_error for a in manifest.adapters]
    # Adapters as files are 2 bytes a number; so is the collection unless it was asked for in fp32.
    original = 2 * sum(a.parameters for a in manifest.adapters)
    size = collection.size_in_bytes()
    width = 4 if manifest.dtype == "fp32" else 2
    numbers = manifest.rank if manifest.method == "diag" else manifest.rank**2
    outputs = [a.output_error for a in manifest.adapters if a.output_error is not None]
    return {
        **{k: v for k, v in asdict(manifest).items() if k not in ("slices", "files")},
        "slices": len(manifest.slices),
        "bytes": {
            "collection": size,
            "adapters_in_bf16": original,
            "one_scaling": len(manifest.slices) * numbers * width,
        },
        "compression_ratio": original / size,
        "relative_error": {"mean": sum(errors) / len(errors), "max": max(errors)},
        "output_error": {"mean": sum(outputs) / len(outputs), "max": max(outputs)} if outputs else None,
    }


def print_report(collection: Collection, as_json: bool) -> None:
    facts = summary(collection)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vllm_jdlora.collection.schema import METRIC_ERRORS

    console = Console()
    size, error = facts["bytes"], facts["relative_error"]
    in_metric = METRIC_ERRORS[facts["metric"]]
    # Names and reasons come from outside: never markup, never control characters.
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    show(
        Text(printable(str(collection.path)), "bold"),
        printable(f" base model {facts['base_model']['name'] or 'unknown'}, revision {facts['revision']}"),
    )
    bases = facts["dtype"] if facts["quantize"] == "none" else f"bases in {facts['quantize']}, Σ in {facts['dtype']}"
    show(
        f"{len(facts['adapters'])} compressed adapters: JD-{facts['method'].capitalize()}, rank {facts['rank']}, "
        f"{facts['clusters']} clusters, {facts['slices']} slices, {bases}; {readable_bytes(size['collection'])} for "
        f"{readable_bytes(size['adapters_in_bf16'])} of adapters, {facts['compression_ratio']:.1f} times smaller at a "
        f"relative error of {error['mean']:.3f} (mean), {error['max']:.3f} (max); "
        f"{readable_bytes(size['one_scaling'])} for each further adapter"
    )
    if facts["output_error"]:
        output, text = facts["output_error"], facts["calibration"]
        seen = f", on {text['tokens']} tokens of calibration text (sha256 {text['text_sha256'][:12]}…)" if text else ""
        show(f"{in_metric} {output['mean']:.3f} (mean), {output['max']:.3f} (max){seen}")
    if facts["error_floor"] is not None:
        show(
            f"certificate: for these clusters no bases of rank {facts['rank']} have a root mean square "
            f"{in_metric} below {facts['error_floor']:.3f}; these reach "
            f"{facts['error_reached']:.3f} (over adapters and the slices certified)"
        )
    columns = ["adapter", "cluster", "relative error", *([in_metric] if facts["output_error"] else []), "ρ"]
    table = Table(*columns, box=None)
    for entry in sorted(facts["adapters"], key=lambda a: (a["cluster"], a["name"])):
        errors = [entry["relative_error"], *([entry["output_error"]] if facts["output_error"] else [])]
        shown = ["" if e is None else f"{e:.3f}" for e in errors]
        table.add_row(Text(entry["name"]), str(entry["cluster"]), *shown, str(entry["rank"]))
    for entry in facts["plain"]:
        table.add_row(Text(entry["name"]), "plain", *["0"] * (len(columns) - 3), str(entry["rank"]))
    console.print(table)
    for entry in facts["plain"]:
        show(printable(f"plain: {entry['name']}: {entry['reason']}"))
    for entry in facts["skipped"]:
        show(printable(f"skipped: {entry['name']}: {entry['reason']}"))
