"""What is made of the timings of many requests: rates, latencies, attainment of a limit, errors by kind."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from openai_client import Timing

SLO_SECONDS = 6.0
"""S-LoRA's limit of the time to the first token."""


@dataclass(frozen=True)
class Spread:
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(statistics.fmean(ordered), *(quantile(ordered, q) for q in (0.5, 0.9, 0.99)))


def quantile(ordered: Sequence[float], q: float) -> float:
    """Between the two values beside the place q·(n−1), as numpy and most tools do it."""
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class TrafficSummary:
    """Of the time from `begin` to `end`.

    Attributes:
        seconds: that time.
        finished: requests whose last token came in it.
        errors: kind → requests that ended with it.
        requests_per_second, output_tokens_per_second: of what came in it; tokens of unfinished requests count.
        tokens_per_second: with the prompts of the requests whose first token came in it.
        ttft, inter_token, end_to_end: time to the first token (of first tokens in it), mean time for each further token
            and time from sending to the last token (of finished requests). Errors have none.
        slo_seconds, slo_attainment: the share of the requests that got a first token or an error in it whose first
            token came in under `slo_seconds`.
        satisfaction: S-LoRA's mean of 1 − (ttft / slo)², 0 for those that were too late or failed.
    """

    seconds: float
    finished: int
    errors: dict[str, int]
    requests_per_second: float
    output_tokens_per_second: float
    tokens_per_second: float
    ttft: Spread | None
    inter_token: Spread | None
    end_to_end: Spread | None
    slo_seconds: float
    slo_attainment: float | None
    satisfaction: float | None

    def as_json(self) -> dict[str, Any]:
        """For JSON, to four decimals."""
        return _rounded(asdict(self))


def summarise(timings: Iterable[Timing], begin: float, end: float, *, slo: float = SLO_SECONDS) -> TrafficSummary:
    """`begin` and `end`: of ``time.perf_counter()``."""
    finished: list[Timing] = []
    first: list[Timing] = []
    errors: Counter[str] = Counter()
    tokens = 0.0
    for timing in timings:
        tokens += timing.tokens_between(begin, end)
        ended = begin <= timing.started + timing.seconds < end
        if timing.error:
            if ended:
                errors[timing.error] += 1
            continue
        if timing.ttft is not None and begin <= timing.started + timing.ttft < end:
            first.append(timing)
        if ended and not timing.left:
            finished.append(timing)
    ttfts = [timing.ttft for timing in first if timing.ttft is not None]
    judged = len(ttfts) + sum(errors.values())
    seconds = end - begin
    return TrafficSummary(
        seconds=seconds,
        finished=len(finished),
        errors=dict(sorted(errors.items())),
        requests_per_second=len(finished) / seconds,
        output_tokens_per_second=tokens / seconds,
        tokens_per_second=(tokens + sum(timing.prompt_tokens for timing in first)) / seconds,
        ttft=Spread.of(ttfts),
        inter_token=Spread.of([t.inter_token for t in finished if t.inter_token is not None]),
        end_to_end=Spread.of([t.seconds for t in finished]),
        slo_seconds=slo,
        slo_attainment=sum(t < slo for t in ttfts) / judged if judged else None,
        satisfaction=sum(max(0.0, 1 - (t / slo) ** 2) for t in ttfts) / judged if judged else None,
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def lines_of(summary: TrafficSummary) -> list[str]:
    """For people to read."""
    lines = [
        f"{summary.finished} requests in {summary.seconds:.1f} s: {summary.requests_per_second:.2f} requests/s, "
        f"{summary.output_tokens_per_second:.1f} output tokens/s, {summary.tokens_per_second:.1f} tokens/s with prompts"
    ]
    for name, spread, scale, unit in (
        ("time to first token", summary.ttft, 1, "s"),
        ("time per further token", summary.inter_token, 1000, "ms"),
        ("end to end", summary.end_to_end, 1, "s"),
    ):
        if spread is not None:
            values = ", ".join(f"{key} {scale * value:.3g}" for key, value in asdict(spread).items())
            lines.append(f"{name}, {unit}: {values}")
    if summary.slo_attainment is not None:
        lines.append(f"first token in under {summary.slo_seconds:g} s: {100 * summary.slo_attainment:.1f} %")
    errors = ", ".join(f"{kind} {count}" for kind, count in summary.errors.items())
    lines.append(f"errors: {errors or 'none'}")
    return lines
