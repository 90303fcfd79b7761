"""`jdlora refresh`: fit a collection's bases again, warm-started, with adapters that came since."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.moments_argument import add_calibration, moments_of_collection
from vllm_jdlora.commands.terminal import printable, progress_bars, refuse_existing
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.collection.drift import Drift
    from vllm_jdlora.collection.refresh import Refreshed


def add_to(commands: Any) -> None:
    parser = commands.add_parser("refresh", help="fit a collection's bases again, from where they are")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument(
        "adapters",
        nargs="+",
        type=Path,
        metavar="ADAPTER",
        help="the collection's own, uncompressed, and new ones",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="NEW", help="folder to create")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; estimate whether a rebuild pays")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="keep adapters with a larger error (of outputs in the activation metric) uncompressed",
    )
    add_calibration(parser)
    parser.add_argument("--base-model", metavar="M", help="name or folder; adapters of another model are refused")
    parser.add_argument("--force", action="store_true", help="replace NEW if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.members import at_hand_of
    from vllm_jdlora.collection.refresh import expected_drift, refresh

    if args.max_error is not None and not 0 <= args.max_error <= 1:
        raise JDLoRAError(f"--max-error is an error between 0 and 1, not {args.max_error:g}")
    if args.output is None and not args.dry_run:
        raise JDLoRAError("give -o NEW for the refreshed collection, or --dry-run")
    if args.output is not None and not args.dry_run:
        refuse_existing(args.output, args.force)
    adapters, _ = read_adapters(args.adapters)
    with progress_bars() as show:
        old = Collection.open(args.collection, verify=False)
        # Those that the collection keeps plain take part too, and may have modules that it has no bases for.
        there = list(at_hand_of(old, adapters).values())
        moments = moments_of_collection(old, there, args.calibration, args.base_model, show)
        if args.dry_run:
            drift = expected_drift(args.collection, adapters, moments=moments, base_model=args.base_model)
        else:
            done = refresh(
                args.collection,
                adapters,
                args.output,
                moments=moments,
                max_error=args.max_error,
                base_model=args.base_model,
                force=args.force,
                progress=show,
            )
    if args.dry_run:
        _report_drift(drift, args.json)
    else:
        _report(done, args.json)
    return 0


def _report_drift(drift: Drift | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(None if drift is None else {**asdict(drift), "rebuild_pays": drift.rebuild_pays}, indent=1))
    else:
        print("no new adapters: nothing drifted" if drift is None else drift.told())


def _report(done: Refreshed, as_json: bool) -> None:
    from vllm_jdlora.collection.schema import METRIC_ERRORS

    manifest = done.collection.manifest
    if as_json:
        report = {
            "collection": str(done.collection.path),
            "revision": manifest.revision,
            "new": done.new,
            "changed": done.changed,
            "moved": done.moved,
            "surrogates": done.surrogates,
            "plain": [asdict(entry) for entry in manifest.plain],
            "relative_error": {"mean_before": done.error_before, "mean_after": done.error_after},
            "output_error": None
            if done.output_after is None
            else {"mean_before": done.output_before, "mean_after": done.output_after},
        }
        print(json.dumps(report, indent=1))
        return
    for name in done.new:
        print(printable(f"new: {name}"))
    for name in done.changed:
        print(printable(f"other content than before: {name}"))
    for name in done.moved:
        print(printable(f"moved to another cluster: {name}"))
    for name in done.surrogates:
        print(printable(f"from its compressed form (the original is missing), its error is an upper bound: {name}"))
    for entry in manifest.plain:
        print(printable(f"plain: {entry.name}: {entry.reason}"))
    print(f"relative error (mean): {done.error_before:.4f} before, {done.error_after:.4f} after")
    if done.output_after is not None:
        before = "not known" if done.output_before is None else f"{done.output_before:.4f}"
        print(f"{METRIC_ERRORS[manifest.metric]} (mean): {before} before, {done.output_after:.4f} after")
    print(printable(f"{done.collection.path}: revision {manifest.revision}"))
