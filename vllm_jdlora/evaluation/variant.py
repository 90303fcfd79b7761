"""One way of keeping a set of adapters, as the evaluation sees it: what it costs, and the ΔW it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_jdlora.adapter import Adapter, read_adapter
from vllm_jdlora.collection import Collection

Update = Mapping[str, tuple[Tensor, Tensor]]
"""Slice name → (B [d_out, r], A [r, d_in]) in fp32 with ΔW = B A; slices that are not changed are left out."""


@dataclass(frozen=True)
class Variant:
    """Uncompressed adapters, a collection, or a baseline.

    Attributes:
        name: for tables and plots.
        bytes: what all adapters take together as stored, shared parts included once.
        update: the ΔW of one adapter by its name.
    """

    name: str
    bytes: int
    update: Callable[[str], Update]


def uncompressed(adapters: Sequence[Adapter]) -> Variant:
    """The adapters as they are, in bf16 (2 bytes a number)."""
    by_name = {adapter.name: adapter for adapter in adapters}

    def update(name: str) -> Update:
        adapter = by_name[name]
        return {part: pair for part in adapter.slices if (pair := adapter.factors(part)) is not None}

    return Variant("uncompressed", 2 * sum(adapter.parameters for adapter in adapters), update)


def of_collection(collection: Collection, name: str) -> Variant:
    """A collection: ΔW = (U_k Σ_i) V_k for its compressed adapters, as stored; those kept plain as they are."""
    slices = collection.manifest.slices
    plain = uncompressed([read_adapter(collection.plain_path(entry.name)) for entry in collection.manifest.plain])
    kept = {entry.name for entry in collection.manifest.plain}

    def update(adapter: str) -> Update:
        if adapter in kept:
            return plain.update(adapter)
        row = collection.index_of(adapter)
        cluster = collection.manifest.adapters[row].cluster
        sigma = collection.matrices(row).float()
        parts = {}
        for i, part in enumerate(slices):
            if bool(sigma[i].any()):
                u, v = (side[0].float() for side in collection.basis(part.name, [cluster]))
                parts[part.name] = (u @ sigma[i], v)
        return parts

    return Variant(name, collection.size_in_bytes() + plain.bytes, update)
