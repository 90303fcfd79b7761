"""The slices that errors are predicted from, which clusters are fitted in which of them, and a guess for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.problem import SliceProblem

# Errors are measured on so many slices, every projection (q, k, v, …) alike and spread over the layers: among 8 drawn
# at random one projection is easily missing, and mean errors come out up to a quarter too low. Less for large stacks.
_MEASURED, _MEASURED_VALUES = 24, 2**30
# Adapters that are fitted in each of the measured slices, for each number of clusters: all of few. Of many, each is
# fitted in one slice at least, so that the cost of a measurement grows with their number and no faster.
_MEMBERS = 64
# Clusters that are fitted in each slice at least: fewer would not tell hard clusters from hard slices.
_CLUSTERS_A_SLICE = 2


class MeasuredSlices(Sequence[SliceProblem]):
    """Up to 24 of the slices, stacked anew at each access: of each projection as many, evenly spread over layers.

    Projections take turns, so that the first few stand for all.
    """

    def __init__(self, slices: Sequence[SliceProblem], names: Sequence[str], values: int) -> None:
        """values: numbers in the stacks of one slice, the largest one."""
        by_projection: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            by_projection.setdefault(name.rpartition(".")[2], []).append(index)
        self.projections = len(by_projection)
        each = max(1, min(_MEASURED, _MEASURED_VALUES // max(1, values)) // self.projections)
        chosen: list[tuple[int, int, int]] = []  # (turn, projection, position)
        for projection, group in enumerate(by_projection.values()):
            count = min(each, len(group))
            chosen += [(i, projection, group[int((i + 0.5) * len(group) / count)]) for i in range(count)]
        self.indices = [position for *_, position in sorted(chosen)]
        self._slices = slices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> SliceProblem:  # type: ignore[override]
        return self._slices[self.indices[index]]


def measured_slices(slices: Slices) -> MeasuredSlices:
    """The slices of a collection that errors are predicted from. Those that `slices` holds are not read again."""
    known = list(slices.held.values()) or [slices[0]]
    return MeasuredSlices(slices, slices.names, max(probe.bt.numel() + probe.a.numel() for probe in known))


def clusters_by_slice(labels: Tensor, slices: int) -> list[list[int]]:
    """For each of so many slices the clusters of the labels [n] that are fitted there, about equally many adapters.

    All of them where these are few. Else every cluster in as many slices as every other, at least one.
    """
    sizes = torch.bincount(labels)
    held = sizes.nonzero()[:, 0]
    times = max(math.ceil(slices * _MEMBERS / len(labels)), math.ceil(slices * _CLUSTERS_A_SLICE / len(held)))
    if times >= slices:
        return [held.tolist() for _ in range(slices)]
    load = [0] * slices
    fitted: list[list[int]] = [[] for _ in range(slices)]
    for k in held[sizes[held].argsort(descending=True, stable=True)].tolist():
        for index in sorted(range(slices), key=lambda index: load[index])[:times]:
            load[index] += int(sizes[k])
            fitted[index].append(k)
    return fitted


def filled(relative: Tensor, known: Tensor) -> Tensor:
    """Relative squared errors [..., n, P] of n adapters in P slices, those that are not `known` [n, P] guessed.

    An adapter is taken to lose what others lose in a slice, times what it loses where both are known.
    """
    counted = known.to(relative)
    tiny = torch.finfo(relative.dtype).tiny
    overall = (relative * counted).sum((-2, -1), keepdim=True) / counted.sum().clamp_min(1)
    in_slice = (relative * counted).sum(-2, keepdim=True) / counted.sum(0).clamp_min(1)
    in_slice = in_slice.where(known.any(0), overall).clamp_min(tiny)  # [..., 1, P]
    own = (relative / in_slice * counted).sum(-1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
    own = own.where(known.any(1, keepdim=True), torch.ones_like(own))  # [..., n, 1]
    return relative.where(known, (own * in_slice).clamp_max(1))
