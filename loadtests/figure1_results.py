"""The measured points of Figure 1: a line of JSON each, and what was finished under the same settings."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figure1_points import Point

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.records import append_line


@dataclass(frozen=True)
class Measured:
    """One point and what came of it; a list has a value for each pair of turns.

    Attributes:
        point: what was measured.
        real: with trained adapters; `error`: of their collection, mean and largest relative error.
        base, server: summaries of the turns of the base and of the server beside it, as `TrafficSummary.as_json`.
        start_seconds: until the server was ready.
        conditions: machine, versions, commit, time.
    """

    point: Point
    real: bool
    error: dict[str, float] | None
    base: list[dict[str, Any]]
    server: list[dict[str, Any]]
    start_seconds: float
    conditions: dict[str, Any]

    @property
    def tokens_per_second(self) -> list[float]:
        """Output tokens."""
        return [turn["output_tokens_per_second"] for turn in self.server]

    @property
    def base_tokens_per_second(self) -> list[float]:
        return [turn["output_tokens_per_second"] for turn in self.base]

    @property
    def ratios(self) -> list[float]:
        """To the base in the turn beside it."""
        return [x / y for x, y in zip(self.tokens_per_second, self.base_tokens_per_second, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def ttft(self, *, base: bool = False) -> list[float]:
        """Median time to the first token of each turn, seconds; turns without one are left out."""
        return [turn["ttft"]["p50"] for turn in (self.base if base else self.server) if turn["ttft"]]

    @property
    def errors(self) -> int:
        return sum(sum(turn["errors"].values()) for turn in (*self.base, *self.server))


@dataclass(frozen=True)
class Results:
    """The file, and the settings whose points belong together: with others, points are measured anew."""

    file: Path
    settings: dict[str, Any]

    def add(self, measured: Measured) -> None:
        values = {**vars(measured), "point": measured.point.as_json()}
        append_line(self.file, {"settings": self.settings, **values})

    def measured(self) -> dict[tuple[str, int], Measured]:
        """(series, adapters) → its last measurement under these settings."""
        found = {}
        for settings, measured in _read(self.file):
            if settings == self.settings:
                found[measured.point.series, measured.point.adapters] = measured
        return found

    def has(self, point: Point) -> bool:
        known = self.measured().get((point.series, point.adapters))
        return known is not None and known.point == point


def last_results(file: Path) -> Results:
    """The results under the settings of the last line. Raises: JDLoRAError: there are none."""
    lines = _read(file)
    if not lines:
        raise JDLoRAError(f"{file}: no point of the figure was measured yet; run `make figure1`")
    return Results(file, lines[-1][0])


def _read(file: Path) -> list[tuple[dict[str, Any], Measured]]:
    found = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else (), 1):
        try:
            values = json.loads(line)
            settings, point = values.pop("settings"), Point(**values.pop("point"))
            found.append((settings, Measured(point=point, **values)))
        except (ValueError, TypeError, KeyError) as error:
            raise JDLoRAError(f"{file}, line {number}: not a point of the figure ({error}); remove it") from error
    return found
