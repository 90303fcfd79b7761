"""Which Σ lies in which slot: a least-recently-used cache over the rows of the worker's Σ buffer."""

from __future__ import annotations

from collections import OrderedDict

from vllm_jdlora.errors import JDLoRAError


class ScalingSlots:
    """Slots for the scaling matrices of a collection's adapters, by their index in the collection."""

    def __init__(self, slots: int):
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self._pinned: set[int] = set()

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, adapter: int) -> bool:
        return adapter in self._slot_of

    def slot(self, adapter: int) -> int:
        """The slot of a resident adapter (``KeyError`` when it is not resident)."""
        return self._slot_of[adapter]

    def touch(self, adapter: int) -> int | None:
        """Mark a resident adapter as just used; its slot, or ``None`` when it is not resident."""
        slot = self._slot_of.get(adapter)
        if slot is not None:
            self._slot_of.move_to_end(adapter)
        return slot

    def victim(self) -> int:
        """Free the slot for a newcomer, evicting the least recently used adapter if need be; the slot.

        The newcomer owns it only after :meth:`occupy`, when its Σ has been copied: a copy that fails leaves no
        half-written slot that counts as resident.
        """
        if not self._free:
            adapter = next((a for a in self._slot_of if a not in self._pinned), None)
            if adapter is None:
                raise JDLoRAError("every scaling slot is pinned: raise --jd-scaling-slots or pin fewer adapters")
            self._free.append(self._slot_of.pop(adapter))
        return self._free[-1]

    def occupy(self, adapter: int, slot: int) -> None:
        self._free.remove(slot)
        self._slot_of[adapter] = slot

    def pin(self, adapter: int) -> None:
        if adapter not in self._slot_of:
            raise KeyError(adapter)
        self._pinned.add(adapter)

    def unpin(self, adapter: int) -> None:
        self._pinned.discard(adapter)
