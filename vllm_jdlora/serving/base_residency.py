"""Which clusters' bases lie in which base slots, and which must come for a step.

While there is a slot for each cluster, cluster k lies in slot k and a step costs nothing here. With fewer slots
(``--jd-base-slots``) the clusters that a step needs come over those that were used longest ago.
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
        clusters: of the collection.
        swaps: how many bases were written into slots, the first ones included.
        bytes: of those.
    """

    def __init__(self, capacity: int, write: Callable[[int, int], int]):
        """
        Args:
            capacity: base slots.
            write: ``write(slot, cluster)`` puts all modules' bases of a cluster into a slot; the bytes.
        """
        self.capacity = capacity
        self.clusters = self.swaps = self.bytes = 0
        self._write = write
        self._cache = SlotCache(capacity, "--jd-base-slots")

    def __len__(self) -> int:
        return len(self._cache)

    @property
    def all_resident(self) -> bool:
        """Each cluster has its own slot, of its own number."""
        return self.clusters <= self.capacity

    def load(self, clusters: int) -> None:
        """Start with a collection of so many clusters: as many as there is room for are resident."""
        self._cache.clear()
        self._cache.reserve(clusters)
        self.clusters = clusters
        for cluster in range(min(clusters, self.capacity)):
            self._bring(cluster)

    def slots(self, clusters: np.ndarray) -> np.ndarray:
        """Base slot of each cluster, int64, after bringing those that are missing; −1 for cluster −1.

        Raises:
            JDLoRAError: more different clusters than slots; nothing has moved.
        """
        if self.all_resident:
            return clusters
        needed = np.unique(clusters[clusters >= 0])
        if len(needed) > self.capacity:
            raise JDLoRAError(
                f"a step has adapters of {len(needed)} clusters and there are {self.capacity} base slots: "
                "raise --jd-base-slots"
            )
        for error in self.bring(needed).values():
            raise error
        return self._cache.slots(clusters)

    def bring(self, clusters: np.ndarray) -> dict[int, JDLoRAError]:
        """Bring those of these different clusters that are missing, at most as many as there are slots.

        Returns:
            What kept clusters from being read.
        """
        if self.all_resident:
            return {}
        present = self._cache.slots(clusters)
        self._cache.touch(present)
        failed = {}
        for cluster in clusters[present < 0].tolist():
            try:
                self._bring(cluster)
            except JDLoRAError as error:
                failed[cluster] = error
        return failed

    def touch(self, slots: np.ndarray) -> None:
        """Mark the bases in these slots as just used; −1 is passed over."""
        if not self.all_resident:
            self._cache.touch(slots)

    def _bring(self, cluster: int) -> None:
        slot = self._cache.victim()
        self.bytes += self._write(slot, cluster)
        self._cache.occupy(cluster, slot)
        self.swaps += 1
