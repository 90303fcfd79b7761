"""What is kept of a soak, as a line of JSON, and what is said of it."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_conditions import conditions
from soak_reference import Checked
from soak_run import Soaked
from soak_series import growth_of, pieces_of, thirds_of
from soak_verdicts import Verdict, kinds_of, verdicts_of
from traffic_summary import summarise


def record_of(
    args: argparse.Namespace, model: Path, soaked: Soaked, checked: Checked | None
) -> tuple[dict[str, Any], list[Verdict]]:
    """The line of JSON, and the verdicts in it."""
    begin, seconds, clients = soaked.begin, soaked.seconds, soaked.clients
    growth = growth_of(soaked.watch.seen, begin, seconds)
    thirds = thirds_of(clients.answers, begin, seconds)
    verdicts = verdicts_of(
        clients,
        soaked.comparisons,
        checked,
        growth,
        thirds,
        minutes=seconds / 60,
        idle=soaked.idle,
        exit_code=soaked.exit_code,
    )
    summary = summarise((a.timing for a in clients.answers), begin, begin + seconds)
    settings = (
        "dtype",
        "eager",
        "slots",
        "base_slots",
        "load",
        "popularity",
        "prompt_tokens",
        "output_tokens",
        "base_share",
        "seed",
    )
    pieces = pieces_of(clients.answers, soaked.watch.seen, begin, seconds, max(2.0, args.seconds / 120))
    record = {
        **conditions(),
        "model": model.name,
        "adapters": args.adapters,
        "minutes": args.minutes,
        "settings": {name: getattr(args, name) for name in settings},
        "interrupted": soaked.interrupted,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "capacity": soaked.capacity.as_json(),
        "requests_per_second_sent": round(soaked.rate, 3),
        "soak": summary.as_json() | {"ends": kinds_of(clients.answers)},
        "latest_seconds": round(latest_of(soaked), 4),
        "checked": checked.as_json() if checked else None,
        "growth": asdict(growth) if growth else None,
        "ttft_thirds": thirds.as_json() if thirds else None,
        "counts": [asdict(c) for c in soaked.comparisons],
        "http_counted_by_server": soaked.http,
        "hostile": {
            "statuses": [[kind, status, n] for (kind, _, status), n in sorted(clients.hostile.statuses.items())],
            "slowest_seconds": {kind: round(s, 3) for kind, s in sorted(clients.hostile.slowest.items())},
            "wrong": clients.hostile.wrong,
        },
        "loaded": dict(clients.operator.outcomes),
        "paused_seconds": clients.operator.paused,
        "events": [
            [e.kind, round(e.called - begin, 2), round(e.answered - begin, 2), e.detail]
            for e in clients.operator.events
        ],
        "pieces": [asdict(piece) for piece in pieces],
        "load_average": os.getloadavg(),
    }
    return record, verdicts


def latest_of(soaked: Soaked) -> float:
    """Seconds that the client itself was late with a request, at worst."""
    return max((a.sent - a.due for a in soaked.clients.answers), default=0.0)


def print_verdicts(verdicts: list[Verdict], soaked: Soaked) -> None:
    capacity = soaked.capacity
    print(
        f"capacity {capacity.requests_per_second:.2f} requests/s, {capacity.output_tokens_per_second:.0f} output "
        f"tokens/s; {soaked.seconds / 60:.1f} minutes at {soaked.rate:.2f} requests/s, sent {latest_of(soaked):.2f} s "
        f"late at worst"
    )
    for verdict in verdicts:
        word = {True: "held  ", False: "BROKEN", None: "open  "}[verdict.held]
        print(f"{word} {verdict.name}: {verdict.figures}")
