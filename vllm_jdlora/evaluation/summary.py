"""One row for each variant: means over adapters, performance relative to the uncompressed adapters, intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.evaluate import UNCOMPRESSED
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.known_mean import mean_of_known

RESAMPLES = 2000
_Items = Callable[[Record], tuple[Sequence[float], Sequence[float] | None]]


@dataclass(frozen=True)
class Estimate:
    """A mean over adapters with its bootstrap 95 % interval, and the adapter that does worst."""

    mean: float
    low: float
    high: float
    worst: float
    worst_adapter: str


@dataclass(frozen=True)
class Row:
    """One variant.

    ``relative_*`` is metric / metric(uncompressed) of each adapter, averaged over adapters; ``loss_change`` is the
    difference of losses, since a ratio says little where an adapter's own loss is near zero. None where answers (or
    moments) were not asked for, and for ratios where the uncompressed adapters score nothing.
    """

    variant: str
    adapters: int
    bytes_per_adapter: float
    share_of_bytes: float
    relative_error: float
    output_error: float | None
    loss: float
    token_accuracy: float
    exact_match: float | None
    rouge_l: float | None
    agreement: float | None
    agreement_with_base: float | None
    loss_change: Estimate
    relative_token_accuracy: Estimate | None
    relative_exact_match: Estimate | None
    relative_rouge_l: Estimate | None


def summarise(records: Sequence[Record], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Row]:
    """Rows in the order in which the variants first appear; leakage records (another adapter's task) are left out.

    Intervals: adapters are drawn with replacement, and the items of each (the same for the variant and the
    uncompressed adapter), ``resamples`` times; percentiles 2.5 and 97.5.

    Raises:
        JDLoRAError: an adapter without its uncompressed record.
    """
    own = [record for record in records if record.adapter == record.task]
    by_variant: dict[str, dict[str, Record]] = {}
    for record in own:
        by_variant.setdefault(record.variant, {})[record.adapter] = record
    reference = by_variant.get(UNCOMPRESSED, {})
    rows = []
    for variant, by_adapter in by_variant.items():
        missing = sorted(by_adapter.keys() - reference.keys())
        if missing:
            raise JDLoRAError(f"no uncompressed record of {missing[0]}; evaluate it again with the same --output")
        pairs = [(record, reference[adapter]) for adapter, record in sorted(by_adapter.items())]
        rows.append(_row(variant, pairs, resamples, seed))
    return rows


def _row(variant: str, pairs: list[tuple[Record, Record]], resamples: int, seed: int) -> Row:
    records = [record for record, _ in pairs]
    with_answers = all(r.answers and u.answers for r, u in pairs)

    loss_change = _estimate(pairs, _losses, np.subtract, np.nanargmax, resamples, seed)
    assert loss_change is not None

    def ratio(items: _Items) -> Estimate | None:
        return _estimate(pairs, items, _ratio, np.nanargmin, resamples, seed)

    return Row(
        variant=variant,
        adapters=len(records),
        bytes_per_adapter=records[0].bytes_per_adapter,
        share_of_bytes=records[0].bytes_per_adapter / pairs[0][1].bytes_per_adapter,
        relative_error=mean_of_known([r.relative_error for r in records]) or 0.0,
        output_error=mean_of_known([r.output_error for r in records]),
        loss=mean_of_known([r.loss for r in records]) or 0.0,
        token_accuracy=mean_of_known([r.token_accuracy for r in records]) or 0.0,
        exact_match=mean_of_known([r.exact_match for r in records]),
        rouge_l=mean_of_known([r.rouge_l for r in records]),
        agreement=mean_of_known([r.agreement for r in records]),
        agreement_with_base=mean_of_known([r.agreement_with_base for r in records]),
        loss_change=loss_change,
        relative_token_accuracy=ratio(_correct),
        relative_exact_match=ratio(_exact) if with_answers else None,
        relative_rouge_l=ratio(_rouge) if with_answers else None,
    )


def _estimate(
    pairs: list[tuple[Record, Record]],
    items: _Items,
    combine: Callable[..., np.ndarray],
    worst: Callable[..., int],
    resamples: int,
    seed: int,
) -> Estimate | None:
    """``combine`` (variant, uncompressed) of the item means of each adapter, averaged over adapters.

    None where the uncompressed adapters score nothing at all.
    """
    generator = np.random.default_rng(seed)
    points = np.empty(len(pairs))
    draws = np.empty((resamples, len(pairs)))
    for column, (record, other) in enumerate(pairs):
        values, weights = (np.asarray(x, float) for x in _weighted(items(record)))
        other_values = np.asarray(items(other)[0], float)
        n = len(values)
        counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
        total = counts @ weights
        points[column] = combine(
            (values * weights).sum() / weights.sum(), (other_values * weights).sum() / weights.sum()
        )
        draws[:, column] = combine(counts @ (values * weights) / total, counts @ (other_values * weights) / total)
    if np.isnan(points).all():
        return None
    chosen = generator.integers(len(pairs), size=draws.shape)
    picked = np.take_along_axis(draws, chosen, axis=1)
    known = ~np.isnan(picked)
    some = known.any(axis=1)
    means = np.where(known, picked, 0)[some].sum(axis=1) / known[some].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    at = int(worst(points))
    return Estimate(float(np.nanmean(points)), float(low), float(high), float(points[at]), pairs[at][0].adapter)


def _weighted(pair: tuple[Sequence[float], Sequence[float] | None]) -> tuple[Sequence[float], Sequence[float]]:
    values, weights = pair
    return values, [1.0] * len(values) if weights is None else weights


def _losses(record: Record) -> tuple[Sequence[float], Sequence[float] | None]:
    return record.losses, record.tokens


def _correct(record: Record) -> tuple[Sequence[float], Sequence[float] | None]:
    return [c / n for c, n in zip(record.correct, record.tokens, strict=True)], record.tokens


def _exact(record: Record) -> tuple[Sequence[float], Sequence[float] | None]:
    return record.exact, None


def _rouge(record: Record) -> tuple[Sequence[float], Sequence[float] | None]:
    return record.rouge, None


def _ratio(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Not a number where the uncompressed adapter scores nothing: such a draw is left out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(others) > 0, values / np.asarray(others), np.nan)
