"""The soak over time: throughput, first tokens and memory in equal pieces, thirds of it compared, and slopes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from soak_traffic import Answer
from soak_watch import Seen
from traffic_summary import Spread

MIB = 1 << 20


@dataclass(frozen=True)
class Piece:
    """`seconds` from `at` on, both after the begin of the soak; None where nothing was seen.

    Attributes:
        tokens_per_second: of the answers. requests: sent.
        ttft_p50, ttft_p99: seconds, of requests sent in it.
        own_mib, resident_mib: memory of the server's processes (`own_mib_of` each), `client_mib` of the load test; the
            last seen in it.
        running, waiting: requests in the engine.
    """

    at: float
    seconds: float
    tokens_per_second: float
    requests: int
    ttft_p50: float | None
    ttft_p99: float | None
    own_mib: float | None
    resident_mib: float | None
    client_mib: float | None
    running: float | None
    waiting: float | None
    own_mib_of: dict[str, float]


def pieces_of(
    answers: Sequence[Answer], seen: Sequence[Seen], begin: float, seconds: float, piece: float
) -> list[Piece]:
    """The soak of so many `seconds` in pieces of `piece` seconds; the last may be shorter."""
    edges = [*np.arange(0, seconds, piece).tolist(), seconds]
    count = len(edges) - 1
    tokens, requests = np.zeros(count), np.zeros(count, int)
    ttfts: list[list[float]] = [[] for _ in range(count)]
    for answer in answers:
        timing = answer.timing
        came = np.array(timing.pieces) + timing.started - begin
        if len(came):
            counted, _ = np.histogram(came, edges)
            tokens += counted * timing.output_tokens / len(came)
        place = int(np.searchsorted(edges, answer.sent - begin, "right")) - 1
        if 0 <= place < count:
            requests[place] += 1
            if timing.ttft is not None:
                ttfts[place].append(timing.ttft)
    found = []
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        spread = Spread.of(ttfts[i])
        last = next((s for s in reversed(seen) if low <= s.at - begin < high), None)
        found.append(
            Piece(
                at=round(low, 3),
                seconds=round(high - low, 3),
                tokens_per_second=round(float(tokens[i]) / (high - low), 1),
                requests=int(requests[i]),
                ttft_p50=round(spread.p50, 4) if spread else None,
                ttft_p99=round(spread.p99, 4) if spread else None,
                own_mib=round(last.own / MIB, 1) if last else None,
                resident_mib=round(last.resident / MIB, 1) if last else None,
                client_mib=round(last.client / MIB, 1) if last else None,
                running=last.running if last else None,
                waiting=last.waiting if last else None,
                own_mib_of={title: round(own / MIB, 1) for title, own in last.own_of.items()} if last else {},
            )
        )
    return found


@dataclass(frozen=True)
class Growth:
    """Of the server's memory after the first third of the soak, when caches are full.

    Attributes:
        own_mib, resident_mib: by the median slope between any two looks (Theil-Sen), times `seconds`.
    """

    seconds: float
    own_mib: float
    resident_mib: float


def growth_of(seen: Sequence[Seen], begin: float, seconds: float) -> Growth | None:
    """None for fewer than three looks."""
    late = [s for s in seen if begin + seconds / 3 <= s.at <= begin + seconds]
    if len(late) < 3:
        return None
    times = np.array([s.at for s in late])

    def grown(values: list[int]) -> float:
        i, j = np.triu_indices(len(times), 1)
        y = np.array(values, float)
        slope = float(np.median((y[j] - y[i]) / (times[j] - times[i])))
        return round(slope * (2 * seconds / 3) / MIB, 2)

    return Growth(2 * seconds / 3, grown([s.own for s in late]), grown([s.resident for s in late]))


@dataclass(frozen=True)
class Thirds:
    """Times to the first token, seconds, of requests sent in the first third of the soak and in the last."""

    first: Spread
    last: Spread

    def ratio(self, percentile: str) -> float:
        ratio: float = getattr(self.last, percentile) / getattr(self.first, percentile)
        return ratio

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: {k: round(v, 4) for k, v in vars(getattr(self, name)).items()} for name in ("first", "last")},
            **{f"{percentile}_ratio": round(self.ratio(percentile), 3) for percentile in ("p50", "p99")},
        }


def thirds_of(answers: Sequence[Answer], begin: float, seconds: float) -> Thirds | None:
    """None where a third has no first token."""

    def spread(low: float, high: float) -> Spread | None:
        ttfts = [a.timing.ttft for a in answers if low <= a.sent - begin < high]
        return Spread.of([ttft for ttft in ttfts if ttft is not None])

    first, last = spread(0, seconds / 3), spread(2 * seconds / 3, seconds)
    return Thirds(first, last) if first and last else None
