"""Which key lies in which slot of a buffer on the device: a least-recently-used cache, for Σ and for bases.

Kept in arrays, so that a step looks up and touches all that it needs in a few numpy calls, however much is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_jdlora.errors import JDLoRAError

_NEVER = np.iinfo(np.int64).max


def with_room(column: np.ndarray, keys: int) -> np.ndarray:
    """A column of −1 at its unused places that has place for this many keys, and one −1 behind, which key −1 reads."""
    if keys < len(column):
        return column
    grown = np.full(2 * keys + 16, -1, dtype=column.dtype)
    grown[: len(column)] = column
    return grown


class SlotCache:
    """Slots by key; keys are small whole numbers, and key −1 is nobody.

    Attributes:
        on_evict: told the key that :meth:`victim` evicts.
    """

    def __init__(self, slots: int, flag: str = "--jd-scaling-slots"):
        """flag: what to raise when all slots are pinned."""
        self._slot_of = with_room(np.empty(0, dtype=np.int64), 0)
        self._key_of = np.full(slots, -1, dtype=np.int64)
        self._last_used = np.zeros(slots, dtype=np.int64)
        self._pinned = np.zeros(slots, dtype=bool)
        self._free = list(range(slots - 1, -1, -1))
        self._flag = flag
        self._clock = 0
        self.on_evict: Callable[[int], None] = lambda key: None

    def __len__(self) -> int:
        return len(self._key_of) - len(self._free)

    def __contains__(self, key: int) -> bool:
        return key < len(self._slot_of) and bool(self._slot_of[key] >= 0)

    @property
    def capacity(self) -> int:
        return len(self._key_of)

    def reserve(self, keys: int) -> None:
        """Keys below this may be asked for from now on."""
        self._slot_of = with_room(self._slot_of, keys)

    def slots(self, keys: np.ndarray) -> np.ndarray:
        """Slot of each key, int64; −1 for one that is not resident and for key −1."""
        return self._slot_of[keys]

    def touch(self, slots: np.ndarray) -> None:
        """Mark what lies in these slots as just used; −1 is passed over."""
        self._clock += 1
        self._last_used[slots[slots >= 0]] = self._clock

    def victim(self) -> int:
        """Free the slot for a newcomer, evicting the least recently used key if need be; the slot.

        The newcomer owns it only after :meth:`occupy`, when its copy is made: a copy that fails leaves no
        half-written slot that counts as resident.

        Raises:
            JDLoRAError: every slot is pinned.
        """
        if not self._free:
            slot = int(np.argmin(np.where(self._pinned, _NEVER, self._last_used)))
            if self._pinned[slot]:
                raise JDLoRAError(f"every slot is pinned: raise {self._flag} or pin fewer adapters")
            key = int(self._key_of[slot])
            self.evict(key)
            self.on_evict(key)
        return self._free[-1]

    def occupy(self, key: int, slot: int) -> None:
        """Give the slot that :meth:`victim` freed to a key, which counts as just used."""
        if self._free.pop() != slot:
            raise ValueError(f"slot {slot} was not freed for {key}")
        self.reserve(key + 1)
        self._slot_of[key] = slot
        self._key_of[slot] = key
        self.touch(np.array([slot]))

    def evict(self, key: int) -> None:
        """Free the slot of a key, pinned or not, if it has one."""
        if key not in self:
            return
        slot = int(self._slot_of[key])
        self._slot_of[key] = self._key_of[slot] = -1
        self._pinned[slot] = False
        self._free.append(slot)

    def clear(self) -> None:
        """Nothing is resident any more."""
        for key in self._key_of[self._key_of >= 0].tolist():
            self.evict(key)
        self._free.sort(reverse=True)

    def pin(self, key: int) -> None:
        """Keep a resident key (``KeyError`` when it is not)."""
        if key not in self:
            raise KeyError(key)
        self._pinned[self._slot_of[key]] = True

    def unpin(self, key: int) -> None:
        if key in self:
            self._pinned[self._slot_of[key]] = False
