"""Host time of `schedule()` with 256 requests running and thousands blocked: ours beside vLLM's walk past each."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

RUNNING, SLOTS, BLOCKED_KEYS = 256, 8, 500
_STEPS = 40


def host_rows(waiting: int) -> list[dict[str, Any]]:
    """Milliseconds of a step, median and least: vLLM with `max_loras`, and each kind of slot here."""
    from lone_scheduler import compressed_adapter, lone_scheduler, plain_adapter, slot_options

    def one_cluster(number: int) -> Any:
        return compressed_adapter(number, cluster=0)

    def own_cluster(number: int) -> Any:
        return compressed_adapter(number, cluster=number)

    rows = []
    for name, slots, adapter in (
        ("vLLM, max_loras", None, plain_adapter),
        ("nothing is scarce", {}, plain_adapter),
        ("plain slots", {"plain_slots": SLOTS}, plain_adapter),
        ("Σ slots", {"scaling_slots": SLOTS}, one_cluster),
        ("base slots", {"base_slots": SLOTS}, own_cluster),
    ):
        options = None if slots is None else slot_options(age_cap=math.inf, **slots)
        with tempfile.TemporaryDirectory() as folder:
            scheduler = lone_scheduler(
                Path(folder), options, max_num_seqs=2 * RUNNING, max_loras=SLOTS if options is None else None
            )
        times = _step_times(scheduler, adapter, 0 if slots == {} else waiting)
        rows.append(
            {
                "limit": name,
                "waiting": len(scheduler.waiting),
                "median_ms": round(1e3 * statistics.median(times), 3),
                "min_ms": round(1e3 * min(times), 3),
            }
        )
    return rows


def _step_times(scheduler: Any, adapter: Callable[[int], Any], waiting: int) -> list[float]:
    from lone_scheduler import finish_step, new_request

    for number in range(RUNNING):
        scheduler.add_request(new_request(adapter(number % SLOTS), answer=2 * _STEPS))
    finish_step(scheduler, scheduler.schedule())
    for number in range(waiting):
        scheduler.add_request(new_request(adapter(SLOTS + number % BLOCKED_KEYS)))
    times = []
    for _ in range(_STEPS):
        start = time.perf_counter()
        output = scheduler.schedule()
        times.append(time.perf_counter() - start)
        finish_step(scheduler, output)
    return times


def shown_host(rows: list[dict[str, Any]]) -> Table:
    table = Table("limit", "blocked", "schedule(), ms (least)")
    for row in rows:
        table.add_row(row["limit"], f"{row['waiting']:,}", f"{row['median_ms']:.2f} ({row['min_ms']:.2f})")
    return table
