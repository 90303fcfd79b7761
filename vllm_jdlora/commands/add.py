"""`jdlora add`: new adapters on the bases of a collection."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.moments_argument import add_calibration, moments_of_collection
from vllm_jdlora.commands.terminal import positive, printable, progress_bars
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.collection.edit import Added


def add_to(commands: Any) -> None:
    parser = commands.add_parser("add", help="project new adapters on a collection's bases")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, metavar="NEW", help="folder to create (default: in place)")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="keep adapters with a larger error uncompressed: of outputs where that is known, else relative",
    )
    parser.add_argument(
        "--grow", type=positive, default=0, metavar="D", help="append D directions of the new adapters to the bases"
    )
    parser.add_argument("--replace", action="store_true", help="an adapter of a known name takes that one's place")
    add_calibration(parser)
    parser.add_argument("--base-model", metavar="M", help="name or folder; adapters of another model are refused")
    parser.add_argument("--force", action="store_true", help="replace NEW if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.edit import add

    if args.max_error is not None and not 0 <= args.max_error <= 1:
        raise JDLoRAError(f"--max-error is an error between 0 and 1, not {args.max_error:g}")
    adapters, _ = read_adapters(args.adapters)
    collection = Collection.open(args.collection, verify=False)
    with progress_bars() as show:
        moments = moments_of_collection(collection, [], args.calibration, args.base_model, show)
    done = add(
        args.collection,
        adapters,
        output=args.output,
        moments=moments,
        max_error=args.max_error,
        grow=args.grow,
        replace_same_name=args.replace,
        base_model=args.base_model,
        force=args.force,
    )
    _report(done, args.json)
    if moments is None and collection.manifest.metric != "frobenius" and done.compressed:
        print(
            f"note: {printable(str(collection.path))} was fitted in the {collection.manifest.metric} metric. The new "
            "adapters were projected in the Frobenius norm, and how much their outputs change is not known: give "
            "--calibration, or the base model's folder as --base-model, to project and measure them in that metric",
            file=sys.stderr,
        )
    return 0


def _report(done: Added, as_json: bool) -> None:
    from vllm_jdlora.collection.schema import METRIC_ERRORS

    manifest = done.collection.manifest
    if as_json:
        facts = {
            "collection": str(done.collection.path),
            "revision": manifest.revision,
            "rank": manifest.rank,
            "compressed": [asdict(entry) for entry in done.compressed],
            "plain": [asdict(entry) for entry in done.plain],
            "replaced": done.replaced,
            "drift": None if done.drift is None else {**asdict(done.drift), "rebuild_pays": done.drift.rebuild_pays},
        }
        print(json.dumps(facts, indent=1))
        return
    for entry in done.compressed:
        again = ", in the old one's place" if entry.name in done.replaced else ""
        output = (
            f", {METRIC_ERRORS[manifest.metric]} {entry.output_error:.3f}" if entry.output_error is not None else ""
        )
        told = f"{entry.name}: cluster {entry.cluster}, relative error {entry.relative_error:.3f}{output}{again}"
        print(printable(told))
    for kept in done.plain:
        print(printable(f"plain: {kept.name}: {kept.reason}"))
    if done.drift is not None:
        print(done.drift.told())
    print(printable(f"{done.collection.path}: revision {manifest.revision}"))
