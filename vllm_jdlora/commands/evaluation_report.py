"""What `jdlora evaluate` prints: a row for each variant, the worst adapters, the leakage study."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vllm_jdlora.commands.terminal import printable, readable_bytes

if TYPE_CHECKING:
    from vllm_jdlora.evaluation.leakage import Distribution
    from vllm_jdlora.evaluation.summary import Estimate, Row


def print_evaluation(rows: Sequence[Row], leaks: dict[str, dict[str, Distribution]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
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
    # Cut-off numbers would say nothing: a narrow terminal wraps the lines itself.
    Console(width=max(console.width, 200), soft_wrap=True).print(table)
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    show("means over adapters, [95 % bootstrap interval over adapters and items]; errors are not squared;")
    show("relative: metric / metric of the uncompressed adapter, worst: of one adapter")
    for row in rows:
        if row.relative_rouge_l and row.variant not in ("base", "uncompressed"):
            worst = row.relative_rouge_l
            show(printable(f"{row.variant}: worst ROUGE-L {worst.worst:.3f} of uncompressed: {worst.worst_adapter}"))
    for name, kinds in leaks.items():
        if not kinds:
            show(f"leakage, {printable(name)}: no two of these adapters share a cluster")
        for kind, changes in kinds.items():
            line = (
                f"leakage, {printable(name)}, pairs of {kind}: {changes.pairs} pairs, loss on the other's task changes "
                f"by {changes.mean:+.4f} [{changes.low:+.4f}, {changes.high:+.4f}], improved in {changes.improved:.0%}"
            )
            show(line)


def _estimate(found: Estimate, form: str) -> str:
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
