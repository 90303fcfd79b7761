"""Rank and clusters from an error or a byte budget: what a collection takes, and choices by its error curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.error_curves import ErrorCurves

MARGIN = 0.1
"""Share by which an adapter's relative error over all slices may exceed its prediction from a few.

32 real adapters, 90 slices: 95 % are within 1.09 of the prediction from 24 slices, 99 % within 1.14.
"""
# What a token costs goes with the rank: of choices that lose at most this much more than the least, the lowest rank.
_AS_GOOD = 1.05


@dataclass(frozen=True)
class Sizes:
    """What n adapters take as stored tensors, in bytes."""

    slices: tuple[tuple[int, int], ...]  # (d_out, d_in)
    plain: tuple[int, ...]  # [n] bytes of each adapter's A and B, kept uncompressed
    basis_width: float = 2  # bytes of a number of U or V
    sigma_width: float = 2  # bytes of a number of Σ
    scale_width: float = 0  # bytes of the scale that each direction of a basis in 8 bits has
    diagonal: bool = False  # Σ as R numbers (JD-Diag), not R × R
    always_plain: int = 0  # bytes of adapters that cannot be compressed

    @property
    def n(self) -> int:
        return len(self.plain)

    @property
    def uncompressed(self) -> int:
        """Bytes if nothing were compressed."""
        return sum(self.plain) + self.always_plain

    def bases(self, clusters: int, rank: int) -> int:
        """K · R · Σ_slices (d_out + d_in) numbers, and their scales."""
        direction = sum((d_out + d_in) * self.basis_width + 2 * self.scale_width for d_out, d_in in self.slices)
        return math.ceil(clusters * rank * direction)

    def scaling(self, rank: int) -> int:
        """Bytes for each further adapter: R × R numbers in each slice."""
        return math.ceil(len(self.slices) * (rank if self.diagonal else rank**2) * self.sigma_width)

    def total(self, clusters: int, rank: int, plain: Sequence[int] = ()) -> int:
        """Bases, Σ of all adapters but those at the positions `plain`, and these uncompressed."""
        kept = sum(self.plain[i] for i in plain) + self.always_plain
        return self.bases(clusters, rank) + (self.n - len(plain)) * self.scaling(rank) + kept


@dataclass(frozen=True)
class Choice:
    """Rank and clusters, what they take, and the errors predicted for the adapters that are compressed.

    `mean_error` and `max_error` are relative errors (not squared), `mean_squared_error` is what the paper reports.
    """

    rank: int
    clusters: int
    bytes: int
    mean_error: float
    max_error: float
    mean_squared_error: float
    method: str = "full"
    plain: tuple[int, ...] = ()  # positions of the adapters that are better kept uncompressed
    cluster: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)  # [n] on the probes


def choices(curves: ErrorCurves, sizes: Sizes, max_error: float | None = None, margin: float = 0.0) -> list[Choice]:
    """Every (K, R) of the curves' grids but K = n, where at least as many adapters as clusters are compressed.

    max_error: adapters whose predicted relative error, times 1 + margin, is above it are kept plain.
    """
    relative = curves.relative_squared()
    out = []
    for row, k in enumerate(curves.clusters):
        if k == curves.n > 1:
            continue
        for column, rank in enumerate(curves.ranks):
            squared = relative[row, column]
            kept = squared.sqrt() * (1 + margin) <= (math.inf if max_error is None else max_error)
            if int(kept.sum()) >= k:
                plain = tuple((~kept).nonzero()[:, 0].tolist())
                errors = squared[kept].sqrt()
                out.append(
                    Choice(
                        rank=rank,
                        clusters=k,
                        bytes=sizes.total(k, rank, plain),
                        mean_error=float(errors.mean()),
                        max_error=float(errors.max()),
                        mean_squared_error=float(squared[kept].mean()),
                        method=curves.method,
                        plain=plain,
                        cluster=curves.labels[row],
                    )
                )
    return out


def choose_for_error(curves: ErrorCurves, sizes: Sizes, max_error: float, *, margin: float = MARGIN) -> Choice:
    """The fewest bytes that keep every adapter's predicted relative error (not squared) at most `max_error`.

    Adapters above it are kept plain and their plain bytes count: a few hard ones do not set everyone's rank.
    Raises JDLoRAError where nothing takes fewer bytes than the adapters themselves.
    """
    best = min(
        choices(curves, sizes, max_error, margin), key=lambda c: (c.bytes, c.mean_squared_error), default=None
    )  # fmt: skip
    if best is None or best.bytes >= sizes.uncompressed:
        smaller = [c.max_error for c in choices(curves, sizes) if c.bytes < sizes.uncompressed]
        reached = (
            f"; with every adapter compressed, {min(smaller):.3f} can be reached in fewer bytes" if smaller else ""
        )
        raise JDLoRAError(
            f"no rank and clusters keep adapters under a relative error of {max_error:g} in fewer bytes than the "
            f"adapters themselves{reached}: allow more error, or serve them as they are"
        )
    return best


def choose_for_bytes(curves: ErrorCurves, sizes: Sizes, max_bytes: int) -> Choice:
    """The least mean squared relative error with every adapter compressed and at most `max_bytes` in all.

    Raises JDLoRAError where even the smallest choice is larger.
    """
    everything = choices(curves, sizes)
    fitting = [c for c in everything if c.bytes <= max_bytes]
    if not fitting:
        smallest = min(everything, key=lambda c: c.bytes)
        raise JDLoRAError(
            f"{max_bytes} bytes are too few for {sizes.n} adapters: the smallest choice (rank {smallest.rank}, "
            f"{smallest.clusters} clusters) takes {smallest.bytes}"
        )
    best = min(fitting, key=lambda c: (c.mean_squared_error, c.bytes))
    rank = _filled(curves.ranks, sizes, best.clusters, best.rank, max_bytes)
    return replace(best, rank=rank, bytes=sizes.total(best.clusters, rank))


def _filled(ranks: Sequence[int], sizes: Sizes, clusters: int, rank: int, max_bytes: int) -> int:
    """The largest rank from this one to the next of the grid's that still fits: error only falls with rank."""
    above = [r for r in ranks if r > rank]
    while rank + 1 < (above[0] if above else rank + 1) and sizes.total(clusters, rank + 1) <= max_bytes:
        rank += 1
    return rank


def best_of(choices: Sequence[Choice]) -> Choice:
    """The least mean squared error; of those nearly as good (5 %) the lowest rank."""
    least = min(choice.mean_squared_error for choice in choices)
    near = [choice for choice in choices if choice.mean_squared_error <= _AS_GOOD * least]
    return min(near, key=lambda choice: (choice.rank, choice.mean_squared_error))


def frontier(curves: ErrorCurves, sizes: Sizes) -> list[Choice]:
    """Choices with every adapter compressed that no other beats in bytes and mean squared error, by bytes."""
    best: list[Choice] = []
    for choice in sorted(choices(curves, sizes), key=lambda c: (c.bytes, c.mean_squared_error)):
        if not best or choice.mean_squared_error < best[-1].mean_squared_error:
            best.append(choice)
    return best
