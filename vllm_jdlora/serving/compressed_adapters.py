"""The compressed adapters of a worker: which LoRA id means which, and their Σ on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import numpy as np

from vllm_jdlora.serving.adapter_directory import AdapterDirectory
from vllm_jdlora.serving.collection_revisions import CollectionRevisions
from vllm_jdlora.serving.load_clock import LoadClock
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scaling_buffer import ScalingBuffer
from vllm_jdlora.serving.slot_cache import SlotCache

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class CompressedAdapters:
    """Binds ids to adapters and brings their Σ to the device when a step wants them.

    Attributes:
        revisions: what paths mean.
        scalings: the Σ buffer.
        slots: which adapter lies in which of its rows.
        directory: which adapter an id means.
        loads: how many Σ were copied to the device.
        moved: called before what lies in a slot, or what an id means, changes.
    """

    def __init__(self, revisions: CollectionRevisions, scalings: ScalingBuffer, clock: LoadClock):
        self.revisions, self.scalings = revisions, scalings
        self.slots = SlotCache(scalings.slots)
        self.directory = AdapterDirectory(self.slots)
        self.loads = 0
        self.moved: Callable[[], None] = lambda: None
        self._clock = clock
        # Arrivals whose id no RPC has announced, so that none may take it back: oldest first.
        self._unannounced: dict[int, None] = {}

    def __contains__(self, lora_id: int) -> bool:
        return lora_id in self.directory

    def bind(self, request: LoRARequest, path: AdapterPath, *, announced: bool) -> None:
        """Let a LoRA id mean a compressed adapter, whatever it meant before, and bring its Σ to the device.

        Args:
            request: with the id.
            path: the request's, parsed.
            announced: by an RPC of its own, so that another RPC will take the id back. Others are forgotten when there
                are too many of them (:meth:`forget_unannounced`).

        Raises:
            JDLoRAError: the adapter is not known or its Σ cannot be used; then the id means nothing.
        """
        lora_id = request.lora_int_id
        try:
            with self._clock:
                adapter = self.directory.at(request.lora_path) or self.revisions.adapter(path)
            self.moved()
            self.directory.bind(request, adapter)
            self.activate(lora_id)
        except BaseException:
            self.unbind(lora_id)
            raise
        if adapter.arrival and not announced:
            self._unannounced[lora_id] = None
        else:
            self._unannounced.pop(lora_id, None)

    def activate(self, lora_id: int) -> bool:
        """Bring the Σ of the adapter that an id means to the device, where it counts as just used.

        Returns:
            Whether it had to be copied.
        """
        index = self.directory.index(lora_id)
        assert index is not None
        if index in self.slots:
            self.slots.touch(self.slots.slots(np.array([index])))
            return False
        self.moved()  # first: a copy that fails has evicted an adapter all the same
        # Files are not read ahead: a Σ of 46 KB that has to come from a local disk costs 0.1 to 0.2 ms of a step, and
        # asking for it 10 ms before saves half of that (32 of them take 3.5 ms, asked for before 1.7 ms).
        with self._clock:
            slot = self.slots.victim()
            adapter = self.directory.adapter(index)
            self.scalings.write(slot, adapter.sigma(), adapter.name)
        self.slots.occupy(index, slot)
        self.loads += 1
        return True

    def unbind(self, lora_id: int) -> bool:
        """Forget what compressed adapter an id means; whether it meant one."""
        self._unannounced.pop(lora_id, None)
        if lora_id not in self.directory:
            return False
        self.moved()
        return self.directory.forget(lora_id)

    def pin(self, lora_id: int) -> None:
        """Never evict the Σ of the adapter that an id means."""
        self.activate(lora_id)
        index = self.directory.index(lora_id)
        assert index is not None
        self.slots.pin(index)

    def clear(self) -> None:
        """Unbind every id; the Σ of a collection's adapters that are resident stay."""
        self.moved()
        self.directory.clear()
        self._unannounced.clear()

    def drop_everything(self) -> None:
        """Forget every id and every Σ: they belong to bases that are going."""
        self.moved()
        self.directory.drop_everything()
        self._unannounced.clear()

    def drop_old_revisions(self, step: list[int]) -> None:
        """Forget revisions that are far back and out of use. step: the LoRA ids that were seen last."""
        for revision in self.revisions.drop_old(self.directory.revisions_of(step)):
            self.moved()
            self.directory.drop(revision)

    def drop_other_bases(self) -> list[range]:
        """Forget all that is not on the newest revision's bases; the numbers of the bases that nothing is on then."""
        revisions, bases = self.revisions.drop_other_bases()
        if revisions:
            self.moved()
            self.directory.drop_with_bases(set(revisions))
        return bases

    def announce(self, lora_id: int) -> None:
        """An RPC names an id, which a step may have bound before."""
        self._unannounced.pop(lora_id, None)

    def forget_unannounced(self, step: Collection[LoRARequest]) -> None:
        """Unbind arrivals that came with steps alone, but for those of this step, when they are too many.

        A request that is still running when its adapter is unloaded binds the id again, and nothing unbinds it.
        """
        surplus = len(self._unannounced) - 2 * self.slots.capacity
        if surplus <= 0:
            return
        running = {request.lora_int_id for request in step}
        for lora_id in [i for i in self._unannounced if i not in running][:surplus]:
            self.unbind(lora_id)
