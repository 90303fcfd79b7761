"""What is made of the scale benchmark's measurements: percentiles, ratios within a round, goals, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from process_tree import Memory

PAGE_CACHE, DISK = "page cache", "disk"
"""Where the Σ of an adapter that was never asked for lies: in memory as part of its file, or not."""


@dataclass
class Listing:
    """``GET /v1/models``: seconds of each of a few, models in it, bytes."""

    seconds: list[float]
    models: int
    bytes: int


@dataclass
class Traffic:
    """One server's share of the rounds.

    Attributes:
        tokens_per_second: of each round.
        ttft: seconds to the first token of each request of all rounds.
        host_microseconds: the host's work on the adapters of a step, of each step of all rounds.
    """

    tokens_per_second: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    host_microseconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens_per_second": [round(x, 1) for x in self.tokens_per_second],
            "ttft_seconds": percentiles(self.ttft, 5),
            "host_microseconds": percentiles(self.host_microseconds, 1),
        }


@dataclass
class Served:
    """What one size showed while it served, beside the smallest one in the same rounds.

    Attributes:
        cold: where Σ lay → ``cold`` or ``warm`` → seconds to the first token of each request.
        metrics_lines: of ``GET /metrics``. log_lines: of the server's log when it was ready.
    """

    adapters: int
    own: Traffic
    reference: Traffic
    cold: dict[str, dict[str, list[float]]]
    listing: Listing
    memory: dict[str, Memory]
    statistics: dict[str, Any]
    metrics_lines: int
    log_lines: int

    @property
    def ratio(self) -> float:
        """Tokens/s over that of the smallest size; the median of the ratios within each round."""
        pairs = zip(self.own.tokens_per_second, self.reference.tokens_per_second, strict=True)
        return statistics.median(own / reference for own, reference in pairs)

    def as_json(self) -> dict[str, Any]:
        cold = {
            where: {kind: percentiles(seconds, 5) for kind, seconds in kinds.items()}
            | {"p99_ratio": round(ratio_of_p99(kinds), 3), "p99_ratio_95%": interval_of_p99(kinds)}
            for where, kinds in self.cold.items()
        }
        return {
            "adapters": self.adapters,
            "beside_reference": {"own": self.own.as_json(), "reference": self.reference.as_json()},
            "tokens_per_second_ratio": round(self.ratio, 4),
            "cold": cold,
            "models": {
                "seconds": round(statistics.median(self.listing.seconds), 4),
                "models": self.listing.models,
                "bytes": self.listing.bytes,
            },
            "memory_bytes": {title: memory.as_json() for title, memory in self.memory.items()},
            "worker": self.statistics,
            "metrics_lines": self.metrics_lines,
            "log_lines_when_ready": self.log_lines,
        }


@dataclass
class StartUps:
    """Of one configuration, after a first start that filled vLLM's caches: until ``/health`` answers."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def beyond(self, other: StartUps) -> tuple[float, float]:
        """How many seconds and processor seconds more than another: medians of the differences within a round."""
        return _median_difference(self.seconds, other.seconds), _median_difference(self.cpu_seconds, other.cpu_seconds)

    def as_json(self) -> dict[str, list[float]]:
        return {name: [round(x, 2) for x in getattr(self, name)] for name in ("seconds", "cpu_seconds")}


@dataclass(frozen=True)
class Goal:
    text: str
    figure: float
    met: bool


def goals_of(served: Sequence[Served], starts: dict[int | None, StartUps]) -> list[Goal]:
    """Each goal whose figures were measured. starts: by number of adapters; None is the server without LoRA."""
    goals = []
    largest = {s.adapters: s for s in served}.get(100_000)
    if largest is not None:
        goals.append(Goal("tokens/s at 100,000 ≥ 0.97 of 100", largest.ratio, largest.ratio >= 0.97))
        for where, kinds in largest.cold.items():
            ratio = ratio_of_p99(kinds)
            goals.append(Goal(f"TTFT p99 at 100,000, Σ in {where}: cold ≤ 1.1 × warm", ratio, ratio <= 1.1))
    for adapters, most in ((10_000, 3.0), (100_000, 15.0)):
        if adapters in starts and None in starts:
            more, _ = starts[adapters].beyond(starts[None])
            goals.append(Goal(f"start-up with {adapters:,}: < {most:.0f} s more than without LoRA", more, more < most))
    return goals


def percentiles(values: Sequence[float], digits: int) -> dict[str, float]:
    if not values:
        return {"count": 0}
    found = np.percentile(values, (50, 90, 99))
    return {"count": len(values)} | {f"p{p}": round(float(v), digits) for p, v in zip((50, 90, 99), found, strict=True)}


def ratio_of_p99(kinds: dict[str, list[float]]) -> float:
    return float(np.percentile(kinds["cold"], 99) / np.percentile(kinds["warm"], 99))


def interval_of_p99(kinds: dict[str, list[float]], resamples: int = 2000) -> tuple[float, float]:
    """What 95 % of resamples (with replacement, of each kind) have as the ratio: how much of it may be chance."""
    draw = np.random.default_rng(0)
    p99 = {
        kind: np.percentile(draw.choice(values, (resamples, len(values))), 99, axis=1) for kind, values in kinds.items()
    }
    low, high = np.percentile(p99["cold"] / p99["warm"], (2.5, 97.5))
    return round(float(low), 3), round(float(high), 3)


def total(memory: dict[str, Memory], kind: str) -> int:
    return sum(getattr(m, kind) for m in memory.values())


def print_tables(served: Sequence[Served], starts: dict[int | None, StartUps], goals: Sequence[Goal]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    table = Table(title="serving, requests uniform over all adapters; ratios within rounds beside the smallest size")
    columns = ["adapters", "tokens/s", "ratio", "TTFT p50 / p99 ms", "cold/warm p99 (95 %)", "host µs/step p50 / p99"]
    for column in (*columns, "/v1/models ms", "memory GB: own, files"):
        table.add_column(column, justify="right")
    for s in served:
        first, host = percentiles(s.own.ttft, 5), percentiles(s.own.host_microseconds, 1)
        cold = [
            f"{where}: {ratio_of_p99(kinds):.2f} ({low:.2f}–{high:.2f})"
            for where, kinds in s.cold.items()
            for low, high in [interval_of_p99(kinds)]
        ]
        table.add_row(
            f"{s.adapters:,}",
            f"{statistics.median(s.own.tokens_per_second):.0f}",
            f"{s.ratio:.3f}",
            f"{1e3 * first['p50']:.0f} / {1e3 * first['p99']:.0f}",
            "\n".join(cold) or "–",
            f"{host['p50']:.0f} / {host['p99']:.0f}",
            f"{1e3 * statistics.median(s.listing.seconds):.0f}",
            f"{total(s.memory, 'anonymous') / 1e9:.2f}, {total(s.memory, 'file') / 1e9:.2f}",
        )
    if served:
        console.print(table)
    if starts:
        table = Table(title="start-up, caches filled: medians, and differences within a round")
        for column in ("adapters", "s", "more than without LoRA", "processor s", "more"):
            table.add_column(column, justify="right")
        for adapters, found in starts.items():
            more = found.beyond(starts[None])
            table.add_row(
                "no LoRA" if adapters is None else f"{adapters:,}",
                f"{statistics.median(found.seconds):.1f}",
                f"{more[0]:+.1f}",
                f"{statistics.median(found.cpu_seconds):.1f}",
                f"{more[1]:+.1f}",
            )
        console.print(table)
    for goal in goals:
        console.print(f"{'met   ' if goal.met else 'MISSED'} {goal.text}: {goal.figure:.3f}", highlight=False)


def _median_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a - b for a, b in zip(one, other, strict=True))
