"""Which clusters' bases lie in which base slots, and which must come for a step.

Bases have numbers: those of a collection that is loaded alone are its clusters', those of one that is loaded beside it
come after them. While there is a slot for each base, all lie in slots. With fewer slots (``--jd-base-slots``) the bases
that a step needs come over those that were used longest ago.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.slot_cache import SlotCache


class ResidentBases:
    """A least-recently-used cache of bases.

    Attributes:
        capacity: base slots.
        clusters: of the collection that was loaded last.
        swaps: how many bases were written into slots, the first ones included.
        bytes: of those.
    """

    def __init__(self, capacity: int, write: Callable[[int, int], int]):
        """
        Args:
            capacity: base slots.
            write: ``write(slot, base)`` puts all modules' bases of that number into a slot; the bytes.
        """
        self.capacity = capacity
        self.clusters = self.swaps = self.bytes = 0
        self._write = write
        self._sets = [range(0)]
        self._cache = SlotCache(capacity, "--jd-base-slots")

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def all_resident(self) -> bool:
        """Each base has its own slot."""
        return sum(map(len, self._sets)) <= self.capacity

    def load(self, clusters: int) -> None:
        """Start with a collection of so many clusters: those that there is room for are resident, k in slot k."""
        self._cache.clear()
        self._cache.reserve(clusters)
        self._sets, self.clusters = [range(clusters)], clusters
        for base in range(min(clusters, self.capacity)):
            self._bring(base)

    def numbers_beside(self, clusters: int) -> range:
        """Numbers that the bases of another collection can have beside those that are there.

        Raises:
            JDLoRAError: too few slots are free.
        """
        taken = sum(map(len, self._sets))
        if taken + clusters > self.capacity:
            raise JDLoRAError(
                f"{clusters} clusters do not fit beside the {taken} that are served: there are {self.capacity} base "
                "slots (--jd-base-slots)"
            )
        first = 0  # the first that are free, so that numbers do not grow with the collections that came and went
        for other in sorted(self._sets, key=lambda numbers: numbers.start):
            if first + clusters <= other.start:
                break
            first = other.stop
        return range(first, first + clusters)

    def load_beside(self, numbers: range) -> None:
        """Bring the bases of another collection into free slots; those that are there stay where they are.

        Args:
            numbers: theirs, by :meth:`numbers_beside`.
        """
        try:
            for base in numbers:
                self._bring(base)
        except BaseException:
            self._evict(numbers)
            raise
        self._sets.append(numbers)
        self.clusters = len(numbers)

    def drop(self, numbers: range) -> None:
        """Free the slots of a collection's bases, which no step will want any more."""
        self._sets.remove(numbers)
        self._evict(numbers)

    def slots(self, bases: np.ndarray) -> np.ndarray:
        """Slot of each base, int64, after bringing those that are missing; −1 for base −1.

        Raises:
            JDLoRAError: more different bases than slots; nothing has moved.
        """
        if self.all_resident:
            return self._cache.slots(bases)
        needed = np.unique(bases[bases >= 0])
        if len(needed) > self.capacity:
            raise JDLoRAError(
                f"a step has adapters of {len(needed)} clusters and there are {self.capacity} base slots: "
                "raise --jd-base-slots"
            )
        for error in self.bring(needed).values():
            raise error
        return self._cache.slots(bases)

    def bring(self, bases: np.ndarray) -> dict[int, JDLoRAError]:
        """Bring those of these different bases that are missing, at most as many as there are slots.

        Returns:
            What kept bases from being read.
        """
        if self.all_resident:
            return {}
        present = self._cache.slots(bases)
        self._cache.touch(present)
        failed = {}
        for base in bases[present < 0].tolist():
            try:
                self._bring(base)
            except JDLoRAError as error:
                failed[base] = error
        return failed

    def touch(self, slots: np.ndarray) -> None:
        """Mark the bases in these slots as just used; −1 is passed over."""
        if not self.all_resident:
            self._cache.touch(slots)

    def _bring(self, base: int) -> None:
        slot = self._cache.victim()
        self.bytes += self._write(slot, base)
        self._cache.occupy(base, slot)
        self.swaps += 1

    def _evict(self, numbers: range) -> None:
        for base in numbers:
            self._cache.evict(base)
