"""Which adapter of the collection a LoRA id means, and where that adapter lies: its cluster and its scaling slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Protocol, TypeVar

import numpy as np

from vllm_jdlora.serving.scaling_slots import ScalingSlots


class AdapterRequest(Protocol):
    """What is read of vLLM's ``LoRARequest``."""

    lora_int_id: int
    lora_path: str


Request = TypeVar("Request", bound=AdapterRequest)


class AdapterDirectory:
    """Compressed adapters by LoRA id; each query costs as much as what it asks for, not as what is known."""

    def __init__(self, clusters: Sequence[int], slots: ScalingSlots):
        """
        Args:
            clusters: cluster of each adapter of the collection.
            slots: where the scaling matrices of the resident ones lie.
        """
        # The entry more is that of index −1, no adapter.
        self._cluster_of = np.array([*clusters, -1], dtype=np.int64)
        self._slots = slots
        self._adapter_of: dict[int, int] = {}
        self._path_of: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._adapter_of)

    def __iter__(self) -> Iterator[int]:
        return iter(self._adapter_of)

    def __contains__(self, lora_id: int) -> bool:
        return lora_id in self._adapter_of

    def adapter(self, lora_id: int) -> int | None:
        """Index in the collection, ``None`` for an id that is not bound."""
        return self._adapter_of.get(lora_id)

    def is_bound(self, request: AdapterRequest) -> bool:
        """Whether the request's id means the adapter that the request names."""
        return self._path_of.get(request.lora_int_id) == request.lora_path

    def bind(self, request: AdapterRequest, adapter: int) -> None:
        """Let the request's id mean this adapter from now on."""
        self._adapter_of[request.lora_int_id] = adapter
        self._path_of[request.lora_int_id] = request.lora_path

    def forget(self, lora_id: int) -> int | None:
        """Unbind an id; the adapter that it meant. Its Σ stays until the slot is wanted."""
        self._path_of.pop(lora_id, None)
        return self._adapter_of.pop(lora_id, None)

    def clear(self) -> None:
        self._adapter_of.clear()
        self._path_of.clear()

    def touch(self, requests: Collection[Request]) -> list[Request]:
        """Mark the resident adapters among these as just used, before a newcomer can evict one; the other requests."""
        path_of, adapter_of = self._path_of, self._adapter_of
        bound = [r for r in requests if path_of.get(r.lora_int_id) == r.lora_path]
        unbound = [] if len(bound) == len(requests) else [r for r in requests if not self.is_bound(r)]
        slots = self._slots.slots(_array((adapter_of[r.lora_int_id] for r in bound), len(bound)))
        self._slots.touch(slots)
        return [bound[i] for i in np.flatnonzero(slots < 0).tolist()] + unbound

    def places(self, lora_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cluster and scaling slot of each LoRA id, int64 each; −1 for both where the id is not bound.

        Raises:
            KeyError: an adapter is not resident.
        """
        ids = lora_ids.tolist()
        adapters = _array(map(self._adapter_of.get, ids, repeat(-1)), len(ids))
        slots = self._slots.slots(adapters)
        clusters = self._cluster_of[adapters]
        if np.any(absent := (slots < 0) & (clusters >= 0)):
            raise KeyError(f"adapter {adapters[absent][0]} is in a step and its scaling matrix in no slot")
        return clusters, slots


def _array(values: Iterable[int], count: int) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64, count=count)
