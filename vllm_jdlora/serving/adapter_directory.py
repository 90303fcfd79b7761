"""Which compressed adapter a LoRA id means, and where that adapter lies: its base and its scaling slot.

An adapter is its path, which names its content. It gets an index, the key of its Σ slot, when an id first means it,
and gives the index back when no id does and its Σ has left the device: so nothing here grows with what is known, nor
with what came and went.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol, TypeVar

import numpy as np
import torch

from vllm_jdlora.serving.slot_cache import SlotCache, with_room


class AdapterRequest(Protocol):
    """What is read of vLLM's ``LoRARequest``."""

    lora_int_id: int
    lora_path: str


Request = TypeVar("Request", bound=AdapterRequest)


@dataclass(frozen=True, eq=False)
class CompressedAdapter:
    """What serves one adapter.

    Attributes:
        path: as requests give it; names the content.
        name: of the adapter, for messages.
        revision: of the collection that the path names.
        base: number of the bases that it uses (:mod:`.base_residency`).
        sigma: reads its Σ as stored, [slices, R, R] or, for JD-Diag, [slices, R], on the host.
        arrival: it came while the server ran, and ``sigma`` holds it: once no id means it, it is forgotten at once.
    """

    path: str
    name: str
    revision: str
    base: int
    sigma: Callable[[], torch.Tensor]
    arrival: bool = False


class AdapterDirectory:
    """Compressed adapters by LoRA id; each query costs as much as what it asks for, not as what is known.

    Attributes:
        arrivals: how many adapters there are that came while the server ran.
    """

    def __init__(self, slots: SlotCache):
        """slots: where the Σ of the resident adapters lie, by the index that is given here."""
        self._slots = slots
        slots.on_evict = self._forget_if_unbound
        self._index_of_id: dict[int, int] = {}
        self._path_of_id: dict[int, str] = {}
        self._index_of_path: dict[str, int] = {}
        # By index: the adapter, how many ids mean it, and its base.
        self._adapters: list[CompressedAdapter | None] = []
        self._bindings: list[int] = []
        self._base_of = with_room(np.empty(0, dtype=np.int64), 0)
        self._unused: list[int] = []
        self.arrivals = 0

    def __len__(self) -> int:
        return len(self._index_of_id)

    def __iter__(self) -> Iterator[int]:
        return iter(self._index_of_id)

    def __contains__(self, lora_id: int) -> bool:
        return lora_id in self._index_of_id

    def index(self, lora_id: int) -> int | None:
        """Index of the adapter that an id means, ``None`` for an id that is not bound."""
        return self._index_of_id.get(lora_id)

    def adapter(self, index: int) -> CompressedAdapter:
        """The adapter with an index in use."""
        adapter = self._adapters[index]
        assert adapter is not None
        return adapter

    def at(self, path: str) -> CompressedAdapter | None:
        """The adapter of this path, if any id means it or its Σ is resident."""
        index = self._index_of_path.get(path)
        return None if index is None else self._adapters[index]

    def is_bound(self, request: AdapterRequest) -> bool:
        """Whether the request's id means the adapter that the request names."""
        return self._path_of_id.get(request.lora_int_id) == request.lora_path

    def bind(self, request: AdapterRequest, adapter: CompressedAdapter) -> None:
        """Let the request's id mean this adapter, that of the request's path, from now on."""
        index = self._index_of_path.get(adapter.path)
        if index is None:
            index = self._enter(adapter)
        self._bindings[index] += 1
        self.forget(request.lora_int_id)  # after the new one counts: it may be the same adapter's
        self._index_of_id[request.lora_int_id] = index
        self._path_of_id[request.lora_int_id] = request.lora_path

    def forget(self, lora_id: int) -> bool:
        """Unbind an id; whether it was bound. Σ of a collection's adapter stays until the slot is wanted."""
        index = self._index_of_id.pop(lora_id, None)
        if index is None:
            return False
        del self._path_of_id[lora_id]
        self._bindings[index] -= 1
        if not self._bindings[index]:
            self._slots.unpin(index)
            if self.adapter(index).arrival:
                self._slots.evict(index)
            if index not in self._slots:
                self._leave(index)
        return True

    def clear(self) -> None:
        """Unbind every id."""
        for lora_id in list(self._index_of_id):
            self.forget(lora_id)

    def drop(self, revision: str) -> None:
        """Forget a revision's adapters, resident or not. Arrivals stay: they need nothing of it but its bases."""
        self._drop_all(a for a in self._in_use() if a.revision == revision and not a.arrival)

    def drop_with_bases(self, revisions: Collection[str]) -> None:
        """Forget all adapters of these revisions, arrivals too."""
        self._drop_all(a for a in self._in_use() if a.revision in revisions)

    def drop_everything(self) -> None:
        """Forget every adapter, resident or not."""
        self._drop_all(self._in_use())

    def revisions_of(self, lora_ids: Iterable[int]) -> set[str]:
        """Revisions of the compressed adapters among these ids."""
        indices = (self._index_of_id.get(lora_id) for lora_id in lora_ids)
        return {self.adapter(index).revision for index in indices if index is not None}

    def touch(self, requests: Collection[Request]) -> list[Request]:
        """Mark the resident adapters among these as just used, before a newcomer can evict one; the other requests."""
        path_of, index_of = self._path_of_id, self._index_of_id
        bound = [r for r in requests if path_of.get(r.lora_int_id) == r.lora_path]
        unbound = [] if len(bound) == len(requests) else [r for r in requests if not self.is_bound(r)]
        slots = self._slots.slots(_array((index_of[r.lora_int_id] for r in bound), len(bound)))
        self._slots.touch(slots)
        return [bound[i] for i in np.flatnonzero(slots < 0).tolist()] + unbound

    def places(self, lora_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Base and scaling slot of each LoRA id, int64 each; −1 for both where the id is not bound.

        Raises:
            KeyError: an adapter is not resident.
        """
        ids = lora_ids.tolist()
        indices = _array(map(self._index_of_id.get, ids, repeat(-1)), len(ids))
        slots = self._slots.slots(indices)
        bases = self._base_of[indices]
        if np.any(absent := (slots < 0) & (bases >= 0)):
            name = self.adapter(int(indices[absent][0])).name
            raise KeyError(f"adapter {name!r} is in a step and its scaling matrix in no slot")
        return bases, slots

    # --- indices --------------------------------------------------------------------------------------------------

    def _enter(self, adapter: CompressedAdapter) -> int:
        if self._unused:
            index = self._unused.pop()
            self._adapters[index] = adapter
        else:
            index = len(self._adapters)
            self._adapters.append(adapter)
            self._bindings.append(0)
            self._base_of = with_room(self._base_of, index + 1)
            self._slots.reserve(index + 1)
        self._base_of[index] = adapter.base
        self._index_of_path[adapter.path] = index
        self.arrivals += adapter.arrival
        return index

    def _leave(self, index: int) -> None:
        adapter = self.adapter(index)
        del self._index_of_path[adapter.path]
        self._adapters[index] = None
        self._base_of[index] = -1
        self._unused.append(index)
        self.arrivals -= adapter.arrival

    def _forget_if_unbound(self, index: int) -> None:
        if not self._bindings[index]:
            self._leave(index)

    def _in_use(self) -> list[CompressedAdapter]:
        return [adapter for adapter in self._adapters if adapter is not None]

    def _drop_all(self, adapters: Iterable[CompressedAdapter]) -> None:
        gone = {self._index_of_path[adapter.path] for adapter in adapters}
        for lora_id in [lora_id for lora_id, index in self._index_of_id.items() if index in gone]:
            del self._index_of_id[lora_id], self._path_of_id[lora_id]
        for index in gone:
            self._bindings[index] = 0
            self._slots.evict(index)
            self._leave(index)


def _array(values: Iterable[int], count: int) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64, count=count)
