"""Waits in figures: of all requests, and of those for the clusters that are least asked for."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

RARE = 0.1
"""Share of the clusters, those least asked for, whose waits are told apart by default."""


def wait_figures(
    waits: Iterable[tuple[int, float]], clusters: int, name: str = "wait", rare_share: float = RARE
) -> dict[str, float | None]:
    """Mean and percentiles of (cluster, seconds); cluster 0 is the commonest. ``None`` where none is rare."""
    found = list(waits)
    everyone = np.array([wait for _, wait in found])
    rare = np.array([wait for cluster, wait in found if cluster >= clusters * (1 - rare_share)])
    figures: dict[str, float | None] = {}
    for prefix, seconds in (("", everyone), ("rare_", rare)):
        told = {"p50": lambda x: np.percentile(x, 50), "p99": lambda x: np.percentile(x, 99), "max": np.max}
        for statistic, of in told.items():
            figures[f"{prefix}{name}_{statistic}"] = round(float(of(seconds)), 4) if len(seconds) else None
    return figures | {f"{name}_mean": round(float(everyone.mean()), 4), "rare_requests": len(rare)}
