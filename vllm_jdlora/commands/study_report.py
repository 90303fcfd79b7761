"""What `jdlora study` prints at its end: the tables of each part, and what was refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.evaluation_report import print_leakage, print_legend, print_rows, print_table, show

if TYPE_CHECKING:
    from vllm_jdlora.evaluation.study.part import Part


def print_study(parts: Mapping[str, Part]) -> None:
    """Parts in their order."""
    for name, part in parts.items():
        show("")
        show(f"— {name} —")
        if name == "sweep":
            _print_sweep(part.facts.get("points", []))
        else:
            for title, rows in part.tables.items():
                if title:
                    show(title)
                print_rows(rows)
        for variant, size in part.facts.get("sizes", {}).items():
            show(f"{variant}: rank {size['rank']}, {size['clusters']} clusters, {size['plain']} adapters kept plain")
        if "pairs" in part.facts:
            print_leakage("reference collection", part.facts["pairs"])
        for method, lost in part.facts.get("energy_lost", {}).items():
            show(f"{method}: energy lost {lost[0]:.4f} at the start, {lost[-1]:.4f} after {len(lost) - 1} rounds")
        for variant, reason in part.refused.items():
            show(f"{variant}: not measured: {reason}")
    show("")
    print_legend()


def _print_sweep(points: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None)
    for heading in ("budget", "JD-", "clusters", "rank", "share of bytes", "rel. error", "out. error", "loss"):
        table.add_column(heading, no_wrap=True, justify="right")
    for point in points:
        numbers = [f"{point[key]:.4f}" for key in ("share_of_bytes", "relative_error", "output_error", "loss")]
        table.add_row(point["budget"], point["method"], str(point["clusters"]), str(point["rank"]), *numbers)
    print_table(table)
