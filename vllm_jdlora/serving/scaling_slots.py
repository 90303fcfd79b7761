"""Which Σ lies in which slot: a least-recently-used cache over the rows of the worker's Σ buffer.

Kept in arrays, so that a step looks up and touches all of its adapters in a few numpy calls, however many are known.
"""

from __future__ import annotations

import numpy as np

from vllm_jdlora.errors import JDLoRAError

_NEVER = np.iinfo(np.int64).max


class ScalingSlots:
    """Slots for the scaling matrices of a collection's adapters, by their index in the collection."""

    def __init__(self, slots: int, adapters: int):
        # One entry more than there are adapters: index −1, no adapter, has slot −1.
        self._slot_of = np.full(adapters + 1, -1, dtype=np.int64)
        self._adapter_of = np.full(slots, -1, dtype=np.int64)
        self._last_used = np.zeros(slots, dtype=np.int64)
        self._pinned = np.zeros(slots, dtype=bool)
        self._free = list(range(slots - 1, -1, -1))
        self._clock = 0

    def __len__(self) -> int:
        return len(self._adapter_of) - len(self._free)

    def __contains__(self, adapter: int) -> bool:
        return bool(self._slot_of[adapter] >= 0)

    def slots(self, adapters: np.ndarray) -> np.ndarray:
        """Slot of each adapter, int64; −1 for one that is not resident and for "adapter" −1."""
        return self._slot_of[adapters]

    def touch(self, slots: np.ndarray) -> None:
        """Mark the adapters in these slots as just used; −1 is passed over."""
        self._clock += 1
        self._last_used[slots[slots >= 0]] = self._clock

    def victim(self) -> int:
        """Free the slot for a newcomer, evicting the least recently used adapter if need be; the slot.

        The newcomer owns it only after :meth:`occupy`, when its Σ has been copied: a copy that fails leaves no
        half-written slot that counts as resident.

        Raises:
            JDLoRAError: every slot is pinned.
        """
        if not self._free:
            slot = int(np.argmin(np.where(self._pinned, _NEVER, self._last_used)))
            if self._pinned[slot]:
                raise JDLoRAError("every scaling slot is pinned: raise --jd-scaling-slots or pin fewer adapters")
            self._slot_of[self._adapter_of[slot]] = -1
            self._adapter_of[slot] = -1
            self._free.append(slot)
        return self._free[-1]

    def occupy(self, adapter: int, slot: int) -> None:
        """Give the slot that :meth:`victim` freed to an adapter, which counts as just used."""
        if self._free.pop() != slot:
            raise ValueError(f"slot {slot} was not freed for adapter {adapter}")
        self._slot_of[adapter] = slot
        self._adapter_of[slot] = adapter
        self.touch(np.array([slot]))

    def pin(self, adapter: int) -> None:
        """Keep a resident adapter (``KeyError`` when it is not)."""
        if adapter not in self:
            raise KeyError(adapter)
        self._pinned[self._slot_of[adapter]] = True

    def unpin(self, adapter: int) -> None:
        if adapter in self:
            self._pinned[self._slot_of[adapter]] = False
