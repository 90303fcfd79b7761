"""`jdlora evaluate`: what collections keep of their adapters' abilities, on the adapters' held-out data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.terminal import positive, printable, readable_bytes
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.adapter import Adapter
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.evaluation.evaluate import Evaluation
    from vllm_jdlora.evaluation.leakage import Distribution
    from vllm_jdlora.evaluation.summary import Estimate, Row
    from vllm_jdlora.evaluation.variant import Variant


def add_to(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="loss, accuracy and answers of compressed adapters on held-out data")
    parser.add_argument("collections", nargs="*", type=Path, metavar="COLLECTION")
    parser.add_argument("--base-model", type=Path, required=True, metavar="M", help="Hugging Face folder")
    parser.add_argument("--adapters", nargs="+", type=Path, required=True, metavar="DIR", help="uncompressed")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="NAME.jsonl for each adapter NAME")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these adapters only")
    parser.add_argument("--limit", type=positive, metavar="N", help="first N test items of each task (default: all)")
    parser.add_argument("--no-answers", action="store_true", help="loss and token accuracy only; no greedy answers")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument("--moments", type=Path, metavar="FILE", help="of jdlora calibrate: report output errors too")
    parser.add_argument("--leakage", action="store_true", help="also: does A, compressed with B, gain on B's task?")
    parser.add_argument(
        "--leakage-pairs", type=positive, metavar="N", help="at most N pairs of each kind (default: all of one cluster)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the model (default: fp32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines to append to, and to go on from")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        import rouge_score  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise JDLoRAError(f"evaluation needs more packages ({error}): pip install 'vllm-jdlora[evaluate]'") from None
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.evaluation.evaluate import Evaluation, read_tasks
    from vllm_jdlora.evaluation.model import SwitchableModel
    from vllm_jdlora.evaluation.records import RecordFile
    from vllm_jdlora.evaluation.summary import summarise
    from vllm_jdlora.evaluation.variant import of_collection

    adapters, _ = read_adapters(args.adapters)
    measured = _only(adapters, args.only)
    tasks = read_tasks(args.tasks, measured, args.limit)
    collections = [Collection.open(path) for path in args.collections]
    for collection in collections:
        _check_same_adapters(collection, adapters)
    variants = [of_collection(c, name) for c, name in zip(collections, _names(args.collections), strict=True)]
    moments = _moments(args.moments, adapters) if args.moments else None
    results = RecordFile(args.output)
    model = SwitchableModel.load(args.base_model, dtype=args.dtype)
    evaluation = Evaluation(model, adapters, tasks, results, moments, args.max_new_tokens)

    total = (len(variants) + 2) * len(tasks)
    records = list(_progress(evaluation.run(variants, answers=not args.no_answers), total, "evaluate"))
    rows = summarise(records)
    facts: dict[str, Any] = {"summary": [asdict(row) for row in rows]}
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
        _print_report(rows, leaks)
    return 0


def _leakage(
    evaluation: Evaluation, collection: Collection, variant: Variant, count: int | None
) -> dict[str, Distribution]:
    from vllm_jdlora.evaluation.leakage import changes, distribution, pairs_of

    pairs = pairs_of(collection, list(evaluation.tasks), count=count)
    found = list(_progress(changes(evaluation, variant, evaluation.adapters, pairs), len(pairs), "leakage"))
    kinds = {
        "one cluster": [change for change in found if change.pair.together],
        "other clusters": [change for change in found if not change.pair.together],
    }
    return {kind: distribution(members) for kind, members in kinds.items() if members}


def _only(adapters: Sequence[Adapter], names: Sequence[str] | None) -> list[Adapter]:
    if names is None:
        return list(adapters)
    unknown = sorted(set(names) - {adapter.name for adapter in adapters})
    if unknown:
        raise JDLoRAError(f"--only: no adapter named {unknown[0]!r}")
    return [adapter for adapter in adapters if adapter.name in names]


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two folders have one name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


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


def _moments(file: Path, adapters: Sequence[Adapter]) -> dict[str, Any]:
    from vllm_jdlora.second_moments import SecondMoments

    moments = SecondMoments.load(file)
    shapes = {name: part.shape for adapter in adapters for name, part in adapter.slices.items()}
    moments.check_fit(list(shapes.values()))
    return {name: moments.of(name) for name in shapes}


def _progress(steps: Iterable[Any], total: int, title: str) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(steps, total=total, desc=title, unit="adapter", smoothing=0.05)


def _print_report(rows: Sequence[Row], leaks: dict[str, dict[str, Distribution]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    with_answers = any(row.relative_rouge_l for row in rows)
    columns = ["variant", "bytes/adapter", "relative error", "output error", "loss", "loss change", "token accuracy"]
    if with_answers:
        columns += ["exact match", "ROUGE-L", "relative ROUGE-L", "worst", "agreement"]
    table = Table(*columns, box=None)
    for row in rows:
        cells = [
            printable(row.variant),
            f"{readable_bytes(row.bytes_per_adapter)} ({row.share_of_bytes:.1%})",
            f"{row.relative_error:.3f}",
            _number(row.output_error),
            f"{row.loss:.4f}",
            _estimate(row.loss_change, "+.4f"),
            f"{row.token_accuracy:.4f}",
        ]
        if with_answers:
            worst = row.relative_rouge_l
            cells += [
                _number(row.exact_match),
                _number(row.rouge_l, ".4f"),
                "-" if worst is None else _estimate(worst, ".4f"),
                "-" if worst is None else printable(f"{worst.worst:.3f} {worst.worst_adapter}"),
                _number(row.agreement),
            ]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(
        "means over adapters; [95 % bootstrap interval over adapters and items]; errors are not squared; "
        "relative = metric / metric of the uncompressed adapter",
        highlight=False,
        markup=False,
    )
    for name, kinds in leaks.items():
        for kind, found in kinds.items():
            line = (
                f"leakage, {printable(name)}, pairs of {kind}: {found.pairs} pairs, loss on the other's task changes "
                f"by {found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}], improved in {found.improved:.0%}"
            )
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _estimate(found: Estimate, form: str) -> str:
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
