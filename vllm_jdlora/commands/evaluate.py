"""`jdlora evaluate`: what collections keep of their adapters' abilities, on the adapters' held-out data."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.evaluation_arguments import add_arguments, baseline_names, check_packages, share
from vllm_jdlora.commands.evaluation_report import print_evaluation
from vllm_jdlora.commands.terminal import progress_bars
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.adapter import Adapter
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.evaluation.evaluate import Evaluation
    from vllm_jdlora.evaluation.leakage import Distribution
    from vllm_jdlora.evaluation.records import Record
    from vllm_jdlora.evaluation.summary import Row
    from vllm_jdlora.evaluation.variant import Variant


_OWN_TEXT = Path("-")
"""`--calibration` without a file: the text that ships with the tool."""


def add_to(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="loss, accuracy and answers of compressed adapters on held-out data")
    parser.add_argument("collections", nargs="*", type=Path, metavar="COLLECTION")
    add_arguments(parser)
    parser.add_argument("--no-answers", action="store_true", help="loss and token accuracy only; no greedy answers")
    parser.add_argument(
        "--baselines",
        nargs="+",
        metavar="NAME",
        help='methods to compare with at the bytes of each collection, or "all"; an unknown name lists them',
    )
    parser.add_argument(
        "--budget",
        nargs="+",
        type=share,
        default=[],
        metavar="SHARE",
        help="further bytes to run the baselines at, as a share of the uncompressed adapters', such as 1/8",
    )
    parser.add_argument(
        "--calibration",
        nargs="?",
        type=Path,
        const=_OWN_TEXT,
        metavar="FILE",
        help="report output errors too; FILE: text (.txt, .jsonl) or moments from jdlora calibrate (.safetensors)",
    )
    parser.add_argument("--leakage", action="store_true", help="also: does A, compressed with B, gain on B's task?")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines to append to, and to go on from")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write bytes.svg and error.svg there")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    check_packages()
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.evaluation.evaluate import Evaluation, chosen, read_tasks
    from vllm_jdlora.evaluation.model import SwitchableModel
    from vllm_jdlora.evaluation.records import RecordFile
    from vllm_jdlora.evaluation.summary import summarise
    from vllm_jdlora.evaluation.variant import of_collection, uncompressed

    adapters, _ = read_adapters(args.adapters)
    measured = chosen(adapters, args.only)
    tasks = read_tasks(args.tasks, measured, args.limit)
    collections = [Collection.open(path) for path in args.collections]
    for collection in collections:
        _check_same_adapters(collection, adapters)
    variants = [of_collection(c, name) for c, name in zip(collections, _names(args.collections), strict=True)]
    moments, gradients = None, None
    budgets = {variant.name: variant.bytes for variant in variants}
    budgets |= {str(part): int(part * uncompressed(adapters).bytes) for part in args.budget}
    names = _baseline_names(args.baselines or (), budgets)
    if args.calibration:
        moments, gradients = _moments(args.calibration, args.base_model, adapters, any("fisher" in n for n in names))
    results = RecordFile(args.output)
    evaluation = Evaluation(
        SwitchableModel.load(args.base_model, dtype=args.dtype), adapters, tasks, results, moments, args.max_new_tokens
    )

    compared = itertools.chain(variants, _fitted(names, budgets, adapters, moments, gradients))
    total = (2 + len(variants) + len(names) * len(budgets)) * len(tasks)
    records = list(_progress(evaluation.run(compared, answers=not args.no_answers), total, "evaluate"))
    rows = summarise(records)
    facts: dict[str, Any] = {"summary": [asdict(row) for row in rows]}
    if args.plots:
        _plot(rows, records, args.plots)
    leaks = {}
    if args.leakage:
        for collection, variant in zip(collections, variants, strict=True):
            leaks[variant.name] = _leakage(evaluation, collection, variant, args.leakage_pairs)
        facts["leakage"] = {
            name: {kind: asdict(found) for kind, found in kinds.items()} for name, kinds in leaks.items()
        }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print_evaluation(rows, leaks)
    return 0


def _leakage(
    evaluation: Evaluation, collection: Collection, variant: Variant, count: int | None
) -> dict[str, Distribution]:
    from vllm_jdlora.evaluation.leakage import by_kind, changes, pairs_of

    pairs = pairs_of(collection, list(evaluation.tasks), count=count)
    return by_kind(list(_progress(changes(evaluation, variant, pairs), len(pairs), "leakage")))


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two folders have one name."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if taken := {"base", "uncompressed"} & set(names):
        raise JDLoRAError(f"a collection named {taken.pop()!r} cannot be told from that row: rename its folder")
    return names


def _baseline_names(asked: Sequence[str], budgets: Mapping[str, int]) -> list[str]:
    names = baseline_names(asked) if asked else []
    if names and not budgets:
        raise JDLoRAError("baselines are compared at equal bytes: name a collection, or a --budget such as 1/8")
    return names


def _fitted(
    names: Sequence[str],
    budgets: Mapping[str, int],
    adapters: Sequence[Adapter],
    moments: Mapping[str, Any] | None,
    gradients: Mapping[str, Any] | None,
) -> Iterator[Variant]:
    """Each baseline at each budget, named ``BASELINE: BUDGET``; fitted when its turn comes."""
    for name in names:
        from vllm_jdlora.evaluation.baseline_variants import baseline

        for label, size in budgets.items():
            variant = baseline(name, adapters, size, second_moments=moments, gradients=gradients, progress=False)
            yield replace(variant, name=f"{name}: {label}")


def _plot(rows: Sequence[Row], records: Sequence[Record], folder: Path) -> None:
    from vllm_jdlora.evaluation.plots import plot_over_bytes, plot_performance_over_error

    plot_over_bytes(rows, folder / "bytes.svg")
    plot_performance_over_error(records, folder / "error.svg")


def _check_same_adapters(collection: Collection, adapters: Sequence[Adapter]) -> None:
    """A collection is compared with the very adapters it was made of."""
    known = {entry.name: entry.sha256 for entry in collection.manifest.adapters}
    known |= {entry.name: entry.sha256 for entry in collection.manifest.plain}
    for adapter in adapters:
        if adapter.name not in known:
            raise JDLoRAError(f"{collection.path}: does not hold the adapter {adapter.name!r}; compress it too")
        if known[adapter.name] != adapter.sha256:
            raise JDLoRAError(f"{collection.path}: {adapter.name} is another version than {adapter.path}")
    if len(known) != len(adapters):
        extra = sorted(known.keys() - {adapter.name for adapter in adapters})[0]
        raise JDLoRAError(f"--adapters lacks {extra!r} of {collection.path}: bytes are shared by all; choose by --only")


def _moments(
    file: Path, base_model: Path, adapters: Sequence[Adapter], gradients: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Second moments of each slice's input, and of its gradients if asked for; gathered on a text, or cached."""
    from vllm_jdlora.evaluation.calibrated import moments_from, slices_of_all

    slices = slices_of_all(adapters)
    with progress_bars() as show:
        text = None if file == _OWN_TEXT else file
        moments = moments_from(text, base_model, slices, gradients=gradients, progress=show)
    return (
        {part.name: moments.of(part.name) for part in slices},
        {name: moments.matrices[key] for name, key in moments.gradients.items()},
    )


def _progress(steps: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(steps, total=total, desc=title, unit="adapter", smoothing=0.05)
