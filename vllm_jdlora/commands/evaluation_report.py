"""What an evaluation prints: a row for each variant, the worst adapters, the leakage study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.terminal import printable, readable_bytes

if TYPE_CHECKING:
    from vllm_jdlora.evaluation.leakage import Distribution
    from vllm_jdlora.evaluation.summary import Estimate, Row


def print_evaluation(rows: Sequence[Row], leaks: dict[str, dict[str, Distribution]]) -> None:
    """A table, the worst adapters, and leakage by the name of its collection."""
    print_rows(rows)
    print_legend()
    for name, kinds in leaks.items():
        print_leakage(name, {kind: asdict(changes) for kind, changes in kinds.items()})


def print_leakage(name: str, kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """kinds: the fields of `Distribution` by the kind of pairs."""
    if not kinds:
        show(f"leakage, {name}: no two of these adapters share a cluster")
    for kind, found in kinds.items():
        show(
            f"leakage, {name}, pairs of {kind}: {found['pairs']} pairs, loss on the other's task changes by "
            f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}], improved in {found['improved']:.0%}"
        )


def show(text: str) -> None:
    """A line of text that the terminal wraps itself."""
    from rich.console import Console

    Console().print(printable(text), highlight=False, markup=False, soft_wrap=True)


def print_rows(rows: Sequence[Row]) -> None:
    """A table of variants, and the worst adapter of each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for heading in ("variant", "bytes each", "rel. error", "out. error", "loss", "loss change", "tokens right"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "variant" else "right")
    with_answers = any(row.rouge_l is not None for row in rows)
    for heading in ("exact", "ROUGE-L", "relative ROUGE-L", "worst", "agree") if with_answers else ():
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        cells = [
            printable(row.variant),
            f"{readable_bytes(row.bytes_per_adapter)} {row.share_of_bytes:.3f}",
            f"{row.relative_error:.3f}",
            _number(row.output_error),
            f"{row.loss:.4f}",
            _estimate(row.loss_change, "+.4f"),
            f"{row.token_accuracy:.4f}",
        ]
        if with_answers:
            found = row.relative_rouge_l
            cells += [
                _number(row.exact_match),
                _number(row.rouge_l, ".4f"),
                "-" if found is None else _estimate(found, ".3f"),
                "-" if found is None else f"{found.worst:.3f}",
                _number(row.agreement),
            ]
        table.add_row(*map(Text, cells))
    print_table(table)
    for row in rows:
        if row.relative_rouge_l and row.variant not in ("base", "uncompressed"):
            worst = row.relative_rouge_l
            show(f"{row.variant}: worst ROUGE-L {worst.worst:.3f} of uncompressed: {worst.worst_adapter}")


def print_legend() -> None:
    """What the numbers of `print_rows` are."""
    show("means over adapters, [95 % bootstrap interval over adapters and items]; errors are not squared;")
    show("relative: metric / metric of the uncompressed adapter, worst: of one adapter")


def print_table(table: Any) -> None:
    """Cut-off numbers would say nothing: a narrow terminal wraps the lines itself."""
    from rich.console import Console

    Console(width=max(Console().width, 200), soft_wrap=True).print(table)


def _estimate(found: Estimate, form: str) -> str:
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
