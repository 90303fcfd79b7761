"""Figure 1 as tables: tokens/s and time to the first token by series and number of adapters, ratios, goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from figure1_points import SERIES
from figure1_results import Measured

Points = Mapping[tuple[str, int], Measured]
FLAT_FROM, MANY = 64, 1024
LEAST_OF_BASE, LEAST_OF_STOCK, FLAT_WITHIN = 0.95, 4.0, 0.03


@dataclass(frozen=True)
class Goal:
    """`value` is None where what it takes was not measured; it is then neither met nor missed."""

    text: str
    value: float | None
    met: bool | None


def ratio_between(points: Points, one: str, other: str, adapters: int) -> float | None:
    """Tokens/s of one series over another's, each relative to the base beside it: the machine's drift cancels."""
    if (first := points.get((one, adapters))) is None or (second := points.get((other, adapters))) is None:
        return None
    return first.ratio / second.ratio


def flatness(points: Points, series: str = "f") -> float | None:
    """(most − least) / most of the ratios to the base, from `FLAT_FROM` adapters on; None for fewer than two points."""
    ratios = [m.ratio for (key, n), m in points.items() if key == series and n >= FLAT_FROM]
    return 1 - min(ratios) / max(ratios) if len(ratios) > 1 else None


def goals_of(points: Points) -> list[Goal]:
    flat = flatness(points)
    most = max((n for key, n in points if key == "f"), default=0)
    errors = float(sum(m.errors for m in points.values()))
    return [
        *(
            _at_least(f"({key})/(a) >= {LEAST_OF_BASE} at {MANY:,}", found and found.ratio, LEAST_OF_BASE)
            for key, found in (("f", points.get(("f", MANY))), ("f8", points.get(("f8", MANY))))
        ),
        *(
            _at_least(
                f"(f)/({key}) >= {LEAST_OF_STOCK:g} at {MANY:,}", ratio_between(points, "f", key, MANY), LEAST_OF_STOCK
            )
            for key in ("c", "c-default")
        ),
        _at_most(f"(f) from {FLAT_FROM} to {most:,} adapters within {FLAT_WITHIN:.0%}", flat, FLAT_WITHIN),
        _at_most("no error", errors, 0),
    ]


def _at_least(text: str, value: float | None, least: float) -> Goal:
    return Goal(text, value, None if value is None else value >= least)


def _at_most(text: str, value: float | None, most: float) -> Goal:
    return Goal(text, value, None if value is None else value <= most)


def markdown(points: Points) -> str:
    """The tables, for a terminal and for a document."""
    counts = sorted({n for _, n in points})
    keys = [series.key for series in SERIES if any(key == series.key for key, _ in points)]
    titles = {series.key: series.title for series in SERIES}

    def table(title: str, cell: Callable[[Measured], str]) -> list[str]:
        lines = [title, "", "| |" + "".join(f" {n:,} |" for n in counts), "|---|" + "---|" * len(counts)]
        for key in keys:
            found = [points.get((key, n)) for n in counts]
            lines.append(f"| ({key}) {titles[key]} |" + "".join(f" {cell(m) if m else ''} |" for m in found))
        return [*lines, ""]

    lines = [
        *table("Output tokens/s of the base beside it, median [range] over pairs of turns:", _of_base),
        *table("Output tokens/s, median, and of the base beside it:", _rates),
        *table("Time to the first token, s: median of medians, and of the base beside it:", _first_tokens),
        *table("LoRA memory on the device, MB (slots, or clusters):", _memory),
    ]
    errors = {n: m.error for (key, n), m in sorted(points.items()) if key == "f" and m.error}
    if errors:
        shown = ", ".join(f"{n}: {e['mean']:.3f} (largest {e['max']:.3f})" for n, e in errors.items())
        lines += [f"Mean relative error of the real collections by number of adapters: {shown}.", ""]
    for goal in goals_of(points):
        value = "not measured" if goal.value is None else f"{goal.value:.3g}, {'met' if goal.met else 'missed'}"
        lines.append(f"- {goal.text}: {value}")
    return "\n".join(lines)


def _of_base(measured: Measured) -> str:
    ratios = measured.ratios
    return f"{measured.ratio:.3f} [{min(ratios):.2f}–{max(ratios):.2f}]"


def _rates(measured: Measured) -> str:
    return f"{_median(measured.tokens_per_second):.0f} / {_median(measured.base_tokens_per_second):.0f}"


def _first_tokens(measured: Measured) -> str:
    own, base = measured.ttft(), measured.ttft(base=True)
    return f"{_median(own):.2f} / {_median(base):.2f}" if own and base else "–"


def _memory(measured: Measured) -> str:
    point = measured.point
    what = f"K {point.clusters}" if point.slots is None else f"{point.slots} slots"
    return f"{point.lora_bytes / 1e6:.0f} ({what})"


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
