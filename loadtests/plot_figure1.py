"""Figure 1 drawn: tokens/s, time to the first token, ratios to base and stock, over the number of adapters."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_conditions import ROOT
from bench_results import draw_anew
from figure1_points import SERIES
from figure1_report import LEAST_OF_BASE, LEAST_OF_STOCK, Points, ratio_between
from figure1_results import Measured, last_results

from vllm_jdlora.evaluation.plot_style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    REFERENCE_LINE,
    SKY,
    VERMILION,
    SavedFigure,
)

RESULTS = ROOT / "loadtests" / "results" / "figure1.jsonl"
PICTURE = ROOT / "docs" / "figure1.svg"
_LOOK = {
    "b": (GREY, "D"),
    "c": (VERMILION, "s"),
    "c-default": (PURPLE, "x"),
    "d": (ORANGE, "^"),
    "e": (GREEN, "v"),
    "f": (BLUE, "o"),
    "f8": (SKY, "P"),
    "f-rank16": (BLACK, "+"),
}
_RATIOS = {("f", "c"): (BLUE, "o"), ("f", "d"): (ORANGE, "^"), ("e", "c"): (GREEN, "v"), ("f", "e"): (GREY, "D")}
"""All of the gain over stock vLLM of equal and of more memory; what the kernels do alone, what compression adds."""


def plot(points: Points, file: Path = PICTURE) -> Path:
    """Four panels; bars are the range over pairs of turns."""
    with SavedFigure(file, 10, 7.5, nrows=2, ncols=2) as ((rate, first), (of_base, of_stock)):
        base = [x for m in points.values() for x in m.base_tokens_per_second]
        _band(rate, base, "(a) base without LoRA")
        _curves(rate, points, lambda m: m.tokens_per_second)
        rate.set(title="output tokens/s", ylim=(0, None))
        _band(first, [x for m in points.values() for x in m.ttft(base=True)], "(a) base without LoRA")
        _curves(first, points, Measured.ttft)
        first.set(title="median time to the first token, s", yscale="log")
        first.yaxis.set_major_formatter("{x:g}")
        _curves(of_base, points, lambda m: m.ratios)
        of_base.axhline(1, **REFERENCE_LINE)
        goal = of_base.axhline(LEAST_OF_BASE, **{**REFERENCE_LINE, "ls": ":"}, label=f"goal {LEAST_OF_BASE}")
        of_base.set(title="output tokens/s relative to the base beside it", ylim=(0, None))
        for one, other in _RATIOS:
            counts = [n for key, n in sorted(points) if key == one and (other, n) in points]
            if counts:
                colour, marker = _RATIOS[one, other]
                ratios = [ratio_between(points, one, other, n) for n in counts]
                of_stock.plot(counts, ratios, color=colour, marker=marker, label=f"({one}) / ({other})")
        of_stock.axhline(1, **REFERENCE_LINE)
        of_stock.axhline(LEAST_OF_STOCK, **{**REFERENCE_LINE, "ls": ":"}, label=f"goal {LEAST_OF_STOCK:g}")
        of_stock.set(title="output tokens/s relative to another series", ylim=(0, None))
        for axis in (rate, first, of_base, of_stock):
            axis.set_xscale("log", base=2)
            axis.set_xlabel("unique adapters")
            ticks = sorted({n for _, n in points if n > 1})
            axis.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=7)
            axis.minorticks_off()
            axis.title.set_fontsize(10)
        # The series look the same in three panels: one legend below all, where it hides no point.
        known = rate.get_legend_handles_labels()
        rate.figure.legend(*known, loc="outside lower center", ncols=3, fontsize=7)
        of_base.legend(handles=[goal], fontsize=7)
        of_stock.legend(fontsize=7)
    return file


def _curves(axis: Any, points: Points, values: Callable[[Measured], list[float]]) -> None:
    for series in SERIES:
        found = [(n, values(m)) for (key, n), m in sorted(points.items()) if key == series.key]
        found = [(n, v) for n, v in found if v]
        if not found:
            continue
        colour, marker = _LOOK[series.key]
        label = f"({series.key}) {series.title}"
        if series.slots == "one":
            # One adapter, whatever the number of adapters.
            axis.axhline(statistics.median(found[0][1]), color=colour, lw=1.2, ls="-.", label=label)
            continue
        middle = [statistics.median(v) for _, v in found]
        spread = [[m - min(v) for m, (_, v) in zip(middle, found, strict=True)]]
        spread += [[max(v) - m for m, (_, v) in zip(middle, found, strict=True)]]
        places = [n for n, _ in found]
        axis.errorbar(places, middle, yerr=spread, color=colour, marker=marker, ms=5, capsize=2, label=label)


def _band(axis: Any, values: list[float], label: str) -> None:
    """The base was measured beside every point: its median, and the range of it all."""
    if values:
        axis.axhline(statistics.median(values), **REFERENCE_LINE, label=label)
        axis.axhspan(min(values), max(values), color="#444444", alpha=0.08, lw=0)


def main() -> None:
    draw_anew(__doc__, RESULTS, PICTURE, lambda results, picture: plot(last_results(results).measured(), picture))


if __name__ == "__main__":
    main()
