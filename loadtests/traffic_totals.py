"""Counts of a load test that can be added up over processes: requests, tokens, attainment, errors by kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from openai_client import Timing


@dataclass
class TrafficTotals:
    """Of all answers that were added.

    Attributes:
        finished: answers without an error.
        prompt_tokens, output_tokens: of the finished ones.
        in_time: finished ones whose first token came within the limit.
        errors: kind → how many.
        begin, end: first sending and last end, seconds of ``time.time()``; None before the first answer.
    """

    finished: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    in_time: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    begin: float | None = None
    end: float | None = None

    def add(self, timing: Timing, *, slo: float, now: float) -> None:
        """An answer that ended at `now` of ``time.time()``; `slo`: the limit of its time to the first token, s."""
        self._widen(now - timing.seconds, now)
        if timing.error:
            self.errors[timing.error] += 1
            return
        self.finished += 1
        self.prompt_tokens += timing.prompt_tokens
        self.output_tokens += timing.output_tokens
        self.in_time += timing.ttft is not None and timing.ttft < slo

    def add_totals(self, other: dict[str, Any]) -> None:
        """Those of another process, as its `as_json` gave them."""
        for name in ("finished", "prompt_tokens", "output_tokens", "in_time"):
            setattr(self, name, getattr(self, name) + other[name])
        self.errors.update(other["errors"])
        if other["begin"] is not None:
            self._widen(other["begin"], other["end"])

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "errors": dict(self.errors)}

    @property
    def attainment(self) -> float | None:
        """The share of all requests whose first token came within the limit; errors missed it."""
        requests = self.finished + self.errors.total()
        return self.in_time / requests if requests else None

    def row(self) -> dict[str, str]:
        """For tables, title → value."""
        seconds = (self.end - self.begin) if self.begin is not None and self.end is not None else 0.0
        rate = (lambda count: f"{count / seconds:.2f}") if seconds > 0 else (lambda count: "")
        return {
            "requests": str(self.finished),
            "requests/s": rate(self.finished),
            "output tokens/s": rate(self.output_tokens),
            "tokens/s with prompts": rate(self.output_tokens + self.prompt_tokens),
            "SLO attainment": "" if self.attainment is None else f"{self.attainment:.4f}",
            "errors": ", ".join(f"{kind} {count}" for kind, count in sorted(self.errors.items())),
        }

    def _widen(self, begin: float, end: float) -> None:
        self.begin = begin if self.begin is None else min(self.begin, begin)
        self.end = end if self.end is None else max(self.end, end)
