"""The mean of figures some of which are not known: errors of adapters without moments, scores without answers."""

from __future__ import annotations

from collections.abc import Sequence


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Of the values there are; None where there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
