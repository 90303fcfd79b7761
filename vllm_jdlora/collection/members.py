"""Who is in a collection that is fitted again: originals at hand, newcomers, and stored UΣV where nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter, SliceShape, read_adapter
from vllm_jdlora.collection.arrivals import best_clusters
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.own_metric import MetricOfSlice
from vllm_jdlora.collection.rewrite import common_slices
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import Factors


@dataclass(frozen=True, eq=False)
class Member:
    """One adapter of the new collection: its original, or the stored UΣV of `row` with the old errors."""

    name: str
    adapter: Adapter | None
    row: int | None


def at_hand_of(old: Collection, originals: Sequence[Adapter]) -> dict[str, Adapter]:
    """The adapters at hand by name: those given, and those the collection keeps plain itself."""
    at_hand = {a.name: a for a in originals}
    if len(at_hand) != len(originals):
        raise JDLoRAError("two of the adapters have one name; rename a folder")
    for entry in old.manifest.plain:
        if entry.name not in at_hand:
            at_hand[entry.name] = read_adapter(old.plain_path(entry.name), entry.name)
    return at_hand


def members_of(old: Collection, adapters: Sequence[Adapter]) -> list[Member]:
    """Every adapter of the new collection in the order of names."""
    rows = {entry.name: row for row, entry in enumerate(old.manifest.adapters)}
    at_hand = {a.name: a for a in adapters}
    return [Member(name, at_hand.get(name), rows.get(name)) for name in sorted(rows.keys() | at_hand.keys())]


def clusters_of(old: Collection, members: Sequence[Member], metrics: MetricOfSlice | None) -> Tensor:
    """The cluster [n] that each member starts from.

    Newcomers, and adapters whose content changed, start in the cluster that fits them best: alternation alone seldom
    moves an adapter, because the bases that are refitted with it bend towards it.
    """
    labels = torch.zeros(len(members), dtype=torch.int64)
    arrivals: dict[int, Adapter] = {}
    for i, member in enumerate(members):
        entry = None if member.row is None else old.manifest.adapters[member.row]
        if member.adapter is not None and (entry is None or member.adapter.sha256 != entry.sha256):
            arrivals[i] = member.adapter
        elif entry is not None:
            labels[i] = entry.cluster
    if arrivals:
        labels[list(arrivals)] = best_clusters(old, list(arrivals.values()), metrics)
    return labels


def slices_of(old: Collection, members: Sequence[Member]) -> list[SliceShape]:
    """The slices that any member has: the old ones in their order, then new ones."""
    adapters = [m.adapter for m in members if m.adapter is not None]
    by_name = {part.name: part for part in (*old.manifest.slices, *common_slices(adapters))}
    used = {name for adapter in adapters for name in adapter.slices}
    present = ~old.slice_errors().isnan()  # [n, S]
    for m in members:
        if m.adapter is None and m.row is not None:
            used |= {part.name for part, has in zip(old.manifest.slices, present[m.row].tolist(), strict=True) if has}
    return [part for name, part in by_name.items() if name in used]


class MemberSource:
    """A `FactorSource` over members: factors are read from disk, or made of the stored UΣV, when asked for."""

    def __init__(self, old: Collection, members: Sequence[Member], slices: Sequence[SliceShape]):
        self._old = old
        self._members = members
        self._places = {part.name: m for m, part in enumerate(old.manifest.slices)}
        self.slice_names = [part.name for part in slices]

    @property
    def n(self) -> int:
        return len(self._members)

    def factors(self, slice_index: int) -> list[Factors | None]:
        name = self.slice_names[slice_index]
        place = self._places.get(name)
        u, v = (torch.zeros(0), torch.zeros(0)) if place is None else self._old.basis(name)
        out: list[Factors | None] = []
        for member in self._members:
            pair = None
            if member.adapter is not None:
                pair = member.adapter.factors(name)
            elif member.row is not None and place is not None:
                pair = surrogate(self._old, member.row, place, u, v)
            out.append(None if pair is None else Factors(*pair))
        return out


def bound_surrogates(
    old: Collection,
    members: Sequence[Member],
    slices: Sequence[SliceShape],
    whole: Tensor,
    by_slice: Tensor,
    *,
    outputs: bool,
) -> None:
    """ε of UΣV -> e + (1 + e)·ε of its original, in place: ‖W − X‖ ≤ ‖W − W̃‖ + ‖W̃ − X‖ and ‖W̃‖ ≤ (1 + e)‖W‖.

    whole [n] over all slices, by_slice [n, S]. outputs: errors in the collection's metric, NaN where e is not known.
    """
    places = {part.name: m for m, part in enumerate(old.manifest.slices)}
    stored = old.slice_output_errors() if outputs else old.slice_errors()
    assert stored is not None
    before = stored.double()
    for i, member in enumerate(members):
        if member.adapter is not None or member.row is None:
            continue
        entry = old.manifest.adapters[member.row]
        e = entry.output_error if outputs else entry.relative_error
        whole[i] = float("nan") if e is None else e + (1 + e) * whole[i]
        for m, part in enumerate(slices):
            if part.name in places:
                old_error = before[member.row, places[part.name]]
                by_slice[i, m] = old_error + (1 + old_error) * by_slice[i, m]


def surrogate(collection: Collection, row: int, m: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """(U_kΣ_i [d_out, R], V_k [R, d_in]) fp32 of a stored adapter in slice m; None where it has nothing."""
    sigma = collection.sigma(row)[m].float()
    if not bool(sigma.any()):
        return None
    k = collection.manifest.adapters[row].cluster
    return u[k].float() @ (sigma.diag() if sigma.ndim == 1 else sigma), v[k].float()
