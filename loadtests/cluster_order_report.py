"""Figures of the cluster order's benchmark: of a turn, of all turns of a server, and as a table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from wait_figures import wait_figures

from vllm_jdlora.serving.options import AGE_CAP

RARE = 0.25
"""Share of the clusters that are the rarest: of a tenth of them too few requests come for a percentile."""
COUNTERS = {
    "base_swaps": "jdlora:base_swaps_total",
    "base_bytes": "jdlora:base_swap_bytes_total",
    "load_seconds": "jdlora:load_seconds_total",
    "steps": "jdlora:clusters_per_step_count",
    "clusters": "jdlora:clusters_per_step_sum",
}
"""Figure of a turn → sample of the server's page of metrics that grew by it."""


@dataclass(frozen=True)
class Turn:
    """What came of one trace on one server.

    Attributes:
        seconds: from the first arrival to the last answer.
        grown: by the names of `COUNTERS`.
        waits: (cluster, seconds from the arrival to the first token) of each request; the rarest cluster is the last.
    """

    order: bool
    round: int
    seconds: float
    grown: dict[str, float]
    waits: list[tuple[int, float]]

    @property
    def requests_per_second(self) -> float:
        return len(self.waits) / self.seconds

    def as_json(self, clusters: int) -> dict[str, Any]:
        return {
            "cluster_order": self.order,
            "round": self.round,
            "requests_per_second": round(self.requests_per_second, 3),
            "seconds": round(self.seconds, 3),
            **{name: round(value, 3) for name, value in self.grown.items()},
            **wait_figures(self.waits, clusters, "first_token", RARE),
        }


def summary_of(turns: list[Turn], order: bool, clusters: int) -> dict[str, Any]:
    """Medians over the rounds, and waits of the requests of all rounds."""
    own = [turn for turn in turns if turn.order is order]
    rates = [turn.requests_per_second for turn in own]
    medians = {name: statistics.median(turn.grown[name] for turn in own) for name in COUNTERS}
    waits = [wait for turn in own for wait in turn.waits]
    return {
        "requests_per_second": round(statistics.median(rates), 3),
        **{name: round(value, 3) for name, value in medians.items()},
        **wait_figures(waits, clusters, "first_token", RARE),
    }


def shown(records: list[dict[str, Any]]) -> Table:
    waits = {"p50": "first_token_p50", "p99": "first_token_p99"}
    waits |= {f"rarest {name}": f"rare_{figure}" for name, figure in waits.items()}
    table = Table("cluster order", "age cap, s", "req/s", "bases brought", "in a step", *waits)
    for record in records:
        for order, found in record["summary"].items():
            table.add_row(
                order,
                f"{record['age_cap'] if order == 'on' else AGE_CAP:g}",
                f"{found['requests_per_second']:.2f}",
                f"{found['base_swaps']:.0f}",
                f"{found['base_swaps'] / found['steps']:.3f}",
                *("–" if found[figure] is None else f"{found[figure]:.2f}" for figure in waits.values()),
            )
    table.caption = "medians over the rounds; seconds to the first token of the requests of all rounds"
    return table


def word_of(order: bool) -> str:
    return "on" if order else "off"
