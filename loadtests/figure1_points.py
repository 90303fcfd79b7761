"""What Figure 1 consists of: its series, the numbers of adapters, and the rank, clusters and slots of every point.

R and K are one rule: JD-Full of rank 8 with a cluster for every two adapters. The first 4, 8, 16 and 32 of the real
adapters that this repository measures with then have a mean relative error of 0.19, 0.19, 0.18 and 0.21 (largest 0.25).
So they have with rank 16 and a cluster for every four, which takes 5 % more memory (`f-rank16`); but a batch whose
requests are in as many clusters as they can be reads bases of twice the size. Either rule holds the error for any
number, even if no newcomer shares anything with those that are there: blocks of 32, compressed one by one, are such a
collection. Where newcomers share directions fewer clusters do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_jdlora.adapter import SliceShape

COUNTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
OURS_ONLY = (10_000,)
SHORT = (4, 64, 1024)
FEW = (64, 1024, *OURS_ONLY)
EVERY_OTHER = (4, 16, 64, 256, 1024, *OURS_ONLY)
RANK = 16
"""Of the adapters."""
_BYTES = 2  # of a number on the device: bf16
_SCALE_BYTES = 4  # of bases in 8 bits: fp32, for each direction of U and of V


@dataclass(frozen=True)
class Bases:
    """R and K of collections of any size: the rank, and how many adapters there are for each cluster."""

    rank: int
    adapters_per_cluster: int

    def clusters(self, adapters: int) -> int:
        return math.ceil(adapters / self.adapters_per_cluster)


BASES = Bases(8, 2)
LARGER_BASES = Bases(16, 4)


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        key: as in the issue of the figure and in all tables: b to f; a is the base beside every point.
        title: what it is.
        kind: ``stock`` (vLLM's own multi-LoRA), ``plain`` (uncompressed adapters here) or ``compressed``.
        slots: LoRA slots: ``one``, ``equal`` (as many as take the memory of f-rank16, which is what f takes and up to
            5 % more, rounded up) or ``all``.
        told: a stock server is told which modules its adapters change; by itself it wraps every linear one and the
            logits, and computes zeros there.
        counts: numbers of adapters it is measured at. None: all of the figure.
        quantize: of compressed adapters' bases, as ``jdlora compress`` takes it.
        bases: of compressed adapters, and of those whose memory ``equal`` slots have.
    """

    key: str
    title: str
    kind: str
    slots: str | None = None
    told: bool = True
    counts: tuple[int, ...] | None = None
    quantize: str = "none"
    bases: Bases = LARGER_BASES


SERIES = (
    Series("b", "stock vLLM, one adapter", "stock", "one", counts=(1,)),
    Series("c", "stock vLLM, slots of equal memory", "stock", "equal"),
    Series("c-default", "the same, not told its targets", "stock", "equal", told=False, counts=(1024,)),
    Series("d", "stock vLLM, a slot for each adapter", "stock", "all"),
    Series("e", "uncompressed here, slots of equal memory", "plain", "equal"),
    Series("f", "compressed", "compressed", bases=BASES),
    Series("f8", "compressed, bases in int8", "compressed", counts=FEW, quantize="int8", bases=BASES),
    Series("f-rank16", "compressed, rank 16, half the clusters", "compressed", counts=EVERY_OTHER),
)
SHORT_SERIES = ("c", "f")


@dataclass(frozen=True)
class Point:
    """One server to be measured.

    Attributes:
        series: its key.
        adapters: unique adapters, all asked for equally often.
        rank: of the bases; of the adapters where they are not compressed.
        clusters: of the collection with that many adapters, whose memory ``equal`` slots have.
        slots: LoRA slots of the server; None for compressed adapters.
        lora_bytes: what adapters take on the device in the modules that they change.
    """

    series: str
    adapters: int
    rank: int
    clusters: int
    slots: int | None
    lora_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoRABytes:
    """Device memory of adapters of rank `RANK` on these slices."""

    slices: tuple[SliceShape, ...]

    @property
    def slot(self) -> int:
        """A LoRA slot of stock vLLM that is told its targets."""
        return self._pair(RANK)

    def compressed(self, adapters: int, clusters: int, rank: int, quantize: str = "none") -> int:
        bases = self._pair(rank)
        if quantize != "none":
            bases = bases // _BYTES + 2 * rank * _SCALE_BYTES * len(self.slices)
        return clusters * bases + adapters * _BYTES * rank**2 * len(self.slices)

    def _pair(self, rank: int) -> int:
        """B and A of an adapter, or U and V of a cluster."""
        return _BYTES * rank * sum(part.d_out + part.d_in for part in self.slices)


def points_of(
    slices: Sequence[SliceShape],
    *,
    series: Iterable[str] | None = None,
    counts: Iterable[int] | None = None,
    clusters: dict[int, int] | None = None,
) -> list[Point]:
    """The points, by number of adapters and then by series, so that a stopped run has whole columns.

    Args:
        series: keys; default all.
        counts: numbers of adapters; default those of the figure, and 10,000 for compressed ones only.
        clusters: adapters → clusters where the rule is not to be used.
    """
    known = {s.key: s for s in SERIES}
    memory = LoRABytes(tuple(slices))
    wanted = tuple(counts) if counts is not None else None
    points = []
    for one in (known[key] for key in (series or known)):
        own = one.counts or (wanted or (COUNTS + OURS_ONLY if one.kind == "compressed" else COUNTS))
        if wanted is not None and one.counts and one.slots != "one":
            own = tuple(n for n in own if n in wanted)
        if one.kind != "compressed":
            own = tuple(n for n in own if n not in OURS_ONLY)
        points += [_point(one, n, memory, (clusters or {}).get(n)) for n in own]
    return sorted(points, key=lambda point: point.adapters)


def _point(series: Series, adapters: int, memory: LoRABytes, clusters: int | None) -> Point:
    rank = series.bases.rank
    clusters = series.bases.clusters(adapters) if clusters is None else clusters
    compressed = memory.compressed(adapters, clusters, rank, series.quantize)
    if series.kind == "compressed":
        return Point(series.key, adapters, rank, clusters, None, compressed)
    slots = {"one": 1, "equal": min(adapters, math.ceil(compressed / memory.slot)), "all": adapters}[series.slots or ""]
    return Point(series.key, adapters, RANK, clusters, slots, slots * memory.slot)
