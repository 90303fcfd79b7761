"""The newest of each row in `results/bench.jsonl` as bars: tokens/s relative to the base, decode and prefill."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench_conditions import ROOT
from bench_results import draw_anew
from bench_rows import ROWS

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.plot_style import BLUE, ORANGE, REFERENCE_COLOUR, REFERENCE_LINE, SavedFigure
from vllm_jdlora.evaluation.records import read_lines

RESULTS = ROOT / "loadtests" / "results" / "bench.jsonl"
PICTURE = ROOT / "docs" / "bench.svg"
_MEASURES = {"decode": BLUE, "prefill": ORANGE}
_TARGETS = {"attention": "q, k, v", "linear": "all seven linear modules"}
_BAR = 0.38


def relative(group: dict[str, Any], measure: str, row: str) -> list[float]:
    """The row's rate over the base's, in each round that both took part in."""
    rates = group["tokens_per_second"].get(measure, {})
    pairs = zip(rates.get(row, []), rates.get("a", []), strict=False)
    return [x / y for x, y in pairs if x is not None and y is not None]


def newest(results: Path) -> dict[str, Any]:
    """Rows and groups of the last record, and of those before it, of equal conditions, the rows that it lacks: a run
    may measure a few. A ratio is within a group in any case.

    Raises:
        JDLoRAError: there is none.
    """
    # Records of older versions of the benchmark have no groups.
    records = [record for _, record in read_lines(results) if "groups" in record] if results.exists() else []
    if not records:
        raise JDLoRAError(f"{results}: no record to draw; run `make bench` first")
    alike = [record for record in records if _conditions(record) == _conditions(records[-1])]
    rows = {key: row for record in alike for key, row in record["rows"].items()}
    return {
        "rows": {row.key: rows[row.key] for row in ROWS if row.key in rows},
        "groups": [group for record in reversed(alike) for group in record["groups"]],
    }


def _conditions(record: dict[str, Any]) -> list[Any]:
    return [record[key] for key in ("hardware", "versions", "model", "dtype", "quick", "workloads")]


def plot(record: dict[str, Any], file: Path = PICTURE) -> Path:
    """Of what `newest` gives: bars with the range over the rounds, one panel for each set of targets."""
    # A row that ran in two groups is drawn from the first, which its own ratios come from too.
    first = {key: group for group in reversed(record["groups"]) for key in group["rows"]}
    panels = {
        targets: [(key, first[key]) for key in record["rows"] if _targets(record, key) == targets]
        for targets in _TARGETS
    }
    panels = {targets: rows for targets, rows in panels.items() if rows}
    if not panels:
        raise SystemExit("nothing to draw: the record has no row with adapters")
    bars = [len(rows) for rows in panels.values()]
    size = (8, 1.1 + 0.62 * sum(bars))
    with SavedFigure(file, *size, grid=False, nrows=len(panels), height_ratios=bars, sharex=True) as axes:
        for axis, (targets, rows) in zip(axes[:, 0], panels.items(), strict=True):
            _draw(axis, record, rows)
            axis.set_title(f"adapters on {_TARGETS[targets]}", loc="left", fontsize=10)
        axes[0, 0].set_xlim(0, 1.1 * axes[0, 0].get_xlim()[1])  # room for the numbers
        axes[0, 0].legend(loc="upper right", bbox_to_anchor=(0.88, 1))
        axes[-1, 0].set_xlabel("tokens/s, % of the base model without LoRA")
    return file


def _targets(record: dict[str, Any], key: str) -> str | None:
    targets: str | None = record["rows"][key]["targets"]
    return targets


def _draw(axis: Any, record: dict[str, Any], rows: list[tuple[str, dict[str, Any]]]) -> None:
    for i, (measure, colour) in enumerate(_MEASURES.items()):
        for y, (key, group) in enumerate(rows):
            values = [100 * v for v in relative(group, measure, key)]
            if not values:
                continue
            middle = statistics.median(values)
            place = y + (i - 0.5) * _BAR
            error = [[middle - min(values)], [max(values) - middle]]
            axis.barh(place, middle, _BAR, color=colour, xerr=error, error_kw={"lw": 1, "ecolor": REFERENCE_COLOUR})
            axis.annotate(f"{middle:.0f} %", (max(values), place), (4, 0), textcoords="offset points", va="center")
        axis.barh(0, 0, color=colour, label=measure)
    axis.axvline(100, **REFERENCE_LINE)
    axis.set_yticks(range(len(rows)), [record["rows"][key]["title"] for key, _ in rows])
    axis.invert_yaxis()
    axis.tick_params(left=False)


def main() -> None:
    draw_anew(__doc__, RESULTS, PICTURE, lambda results, picture: plot(newest(results), picture))


if __name__ == "__main__":
    main()
