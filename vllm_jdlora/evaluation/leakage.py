"""Leakage (the paper's H.2): does adapter A, compressed together with B, get better at B's task?"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_jdlora.collection import Collection
from vllm_jdlora.evaluation.evaluate import Evaluation
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.variant import Variant


@dataclass(frozen=True)
class Pair:
    """Adapter A on B's task; ``together``: both are in one cluster, so that they share bases."""

    adapter: str
    task: str
    together: bool


@dataclass(frozen=True)
class Change:
    """Loss of A on B's test items, uncompressed and compressed (nats a token)."""

    pair: Pair
    before: Record
    after: Record

    @property
    def loss(self) -> float:
        """Below zero: compression made A better at B's task."""
        return self.after.loss - self.before.loss


@dataclass(frozen=True)
class Distribution:
    """Changes of loss over pairs: mean with its bootstrap 95 % interval (pairs drawn), percentiles, share improved."""

    pairs: int
    mean: float
    low: float
    high: float
    percentiles: dict[str, float]
    improved: float


def pairs_of(collection: Collection, names: Sequence[str], *, count: int | None = None, seed: int = 0) -> list[Pair]:
    """Ordered pairs among ``names``: those that share a cluster, and as many that do not, as a control.

    Args:
        collection: where adapters are in clusters.
        names: adapters with tasks; those kept plain have no pairs.
        count: at most so many pairs of each kind, drawn at random.
        seed: of the draw.
    """
    cluster = {entry.name: entry.cluster for entry in collection.manifest.adapters if entry.name in set(names)}
    every = [(a, b) for a in sorted(cluster) for b in sorted(cluster) if a != b]
    shared = [Pair(a, b, True) for a, b in every if cluster[a] == cluster[b]]
    apart = [Pair(a, b, False) for a, b in every if cluster[a] != cluster[b]]
    generator = random.Random(seed)
    shared = sorted(generator.sample(shared, min(len(shared), count or len(shared))), key=str)
    return shared + sorted(generator.sample(apart, min(len(apart), len(shared))), key=str)


def changes(evaluation: Evaluation, variant: Variant, pairs: Sequence[Pair]) -> Iterator[Change]:
    """The loss of each pair's adapter on the other's test items, before and after compression."""
    for pair in pairs:
        before, after = (
            evaluation.measure(v, pair.adapter, pair.task, answers=False) for v in (evaluation.originals, variant)
        )
        yield Change(pair, before, after)


def by_kind(found: Sequence[Change]) -> dict[str, Distribution]:
    """Of the pairs of one cluster and of those of different ones, where there are any."""
    kinds = {
        "one cluster": [change for change in found if change.pair.together],
        "other clusters": [change for change in found if not change.pair.together],
    }
    return {kind: distribution(members) for kind, members in kinds.items() if members}


def distribution(found: Sequence[Change], *, resamples: int = 2000, seed: int = 0) -> Distribution:
    """Of at least one change."""
    values = np.array([change.loss for change in found])
    generator = np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    percentiles = {f"p{p}": float(np.percentile(values, p)) for p in (5, 25, 50, 75, 95)}
    return Distribution(
        len(values), float(values.mean()), float(low), float(high), percentiles, float((values < 0).mean())
    )
