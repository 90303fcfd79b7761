"""What is made of the rounds: rates, ratios within a round, the goals, and the tables that show them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench_engine import Turn, Workload
from bench_rows import Row

DECODE_STEPS = "decode steps"
_ADAPTS = {None: "", "attention": "q, k, v", "linear": "all seven"}
Rates = dict[str, dict[str, list[float | None]]]
"""Measure → row → tokens/s in each round, None where it did not take part."""


@dataclass(frozen=True)
class Goal:
    """A ratio of two rows and what it must be: at least ``least``, or equal within ``within``."""

    ratio: str
    text: str
    least: float | None = None
    within: float | None = None

    def met(self, ratio: float) -> bool:
        return ratio >= self.least if self.least is not None else abs(ratio - 1) <= (self.within or 0)


GOALS = (
    Goal("d1000/a", "q, k, v: ≥ 0.95 of the base", least=0.95),
    Goal("s-d1000/a", "all seven: ≥ 0.90 of the base", least=0.90),
    Goal("d1000/c8-default", "q, k, v: ≥ 4 × stock", least=4),
    Goal("d1000/c8", "q, k, v: ≥ 4 × stock told its targets", least=4),
    Goal("s-d1000/s-c8", "all seven: ≥ 4 × stock", least=4),
    Goal("d1000/d8", "1,000 as 8 adapters within 2 %", within=0.02),
    Goal("d1000-k128/d1000", "128 as 8 clusters within 5 %", within=0.05),
)
OTHER_RATIOS = (
    *("d1000/p32", "p32/a", "p32/c8", "d1000/c64", "d8/a", "d8/c8", "a-eager/a", "s-d1000/s-p32", "s-p32/a"),
    *("s-d1000-8bit/a", "s-d1000-8bit/s-d1000"),
)
"""Besides the goals: what compression gains, what better kernels do, what compilation does."""
RATIOS = (*(goal.ratio for goal in GOALS), *OTHER_RATIOS)


@dataclass
class Group:
    """Rows that took turns with each other."""

    rows: list[Row]
    rates: Rates = field(default_factory=dict)
    memory_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    threads: int = 0

    def add(self, round_: int, rounds: int, row: Row, workload: Workload, turn: Turn) -> None:
        measured = {workload.name: turn.tokens / turn.seconds}
        if turn.decode_tokens:
            measured[DECODE_STEPS] = turn.decode_tokens / turn.decode_seconds
        for measure, rate in measured.items():
            rates = self.rates.setdefault(measure, {}).setdefault(row.key, [None] * rounds)
            rates[round_] = rate

    def ratios(self, measure: str, one: str, other: str) -> list[float]:
        """In each round that both took part in: both numbers of a ratio come from the same minutes."""
        rates = self.rates[measure]
        if one not in rates or other not in rates:
            return []
        return [x / y for x, y in zip(rates[one], rates[other], strict=True) if x is not None and y is not None]


def ratios_of(groups: Sequence[Group]) -> dict[str, dict[str, float]]:
    """Measure → ratio → median over rounds, of the first group that has both rows."""
    found: dict[str, dict[str, float]] = {}
    for name in RATIOS:
        one, other = name.split("/")
        for group in groups:
            for measure in group.rates:
                if (values := group.ratios(measure, one, other)) and name not in found.setdefault(measure, {}):
                    found[measure][name] = round(statistics.median(values), 3)
    return found


def goals_of(ratios: dict[str, dict[str, float]]) -> Iterator[tuple[Goal, dict[str, float]]]:
    """Each goal that was measured, with its ratio in each measure."""
    for goal in GOALS:
        if figures := {measure: values[goal.ratio] for measure, values in ratios.items() if goal.ratio in values}:
            yield goal, figures


def print_tables(groups: Sequence[Group], workloads: Sequence[Workload], ratios: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=156)
    about = {w.name: f"{w.name}: {w.requests} x {w.prompt_tokens} in, {w.output_tokens} out" for w in workloads}
    for group in groups:
        table = Table(title="tokens/s, their range over the rounds, and the ratio to (a)")
        measures = list(group.rates)
        for column in ("", "configuration", "adapts"):
            table.add_column(column, no_wrap=True)
        for measure in measures:
            table.add_column(about.get(measure, measure), justify="right", min_width=18)
        for row in group.rows:
            cells = [_cell(group, measure, row.key) for measure in measures]
            table.add_row(row.key, row.title, _ADAPTS[row.targets], *cells)
        console.print(table)
    memory = ", ".join(f"({k}) {m['peak'] / 1e9:.2f}" for g in groups for k, m in g.memory_bytes.items())
    console.print(f"peak memory of each engine, GB: {memory}")
    measures = list(ratios)
    others = Table(title="other ratios")
    for column in ("", *measures):
        others.add_column(column, justify="right" if column else "left")
    for name in OTHER_RATIOS:
        if any(name in ratios[m] for m in measures):
            others.add_row(name, *(f"{ratios[m][name]:.2f}" if name in ratios[m] else "–" for m in measures))
    if others.row_count:
        console.print(others)
    goals = Table(title="goals")
    for column in ("goal", "ratio", *measures, "met"):
        goals.add_column(column, justify="left" if column in ("goal", "ratio") else "right")
    for goal, figures in goals_of(ratios):
        shown = [f"{figures[m]:.3f}{'' if goal.met(figures[m]) else ' ✗'}" if m in figures else "–" for m in measures]
        met = all(goal.met(figure) for figure in figures.values())
        goals.add_row(goal.text, goal.ratio, *shown, "yes" if met else "no")
    if goals.row_count:
        console.print(goals)


def _cell(group: Group, measure: str, key: str) -> str:
    known = [x for x in group.rates[measure].get(key, []) if x is not None]
    if not known:
        return "–"
    of_base = group.ratios(measure, key, "a")
    share = f" {statistics.median(of_base):.2f}" if of_base else ""
    return f"{statistics.median(known):.0f} \\[{min(known):.0f}–{max(known):.0f}]{share}"


def as_json(group: Group) -> dict[str, Any]:
    return {
        "rows": [row.key for row in group.rows],
        "threads": group.threads,
        "tokens_per_second": {
            measure: {key: [None if x is None else round(x, 1) for x in values] for key, values in rates.items()}
            for measure, rates in group.rates.items()
        },
        "memory_bytes": group.memory_bytes,
    }
