"""The LoRA manager of a worker: cluster bases stay on the device, Σ come and go.

vLLM's own manager has the bases and the plain adapters (:mod:`.bases_manager`). New are the Σ buffer, the map from an
adapter to its (cluster, Σ slot), and one step between shrink and expand.
"""

from __future__ import annotations

import logging
from collections import abc
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.quantize import STORED
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.token_tiles import runs
from vllm_jdlora.serving.base_loading import BaseReader
from vllm_jdlora.serving.base_residency import ResidentBases
from vllm_jdlora.serving.bases_manager import BaseSlotsManager
from vllm_jdlora.serving.collection_revisions import CollectionRevisions, open_revision
from vllm_jdlora.serving.compressed_adapters import CompressedAdapters
from vllm_jdlora.serving.failed_adapters import FAILED
from vllm_jdlora.serving.load_clock import LoadClock
from vllm_jdlora.serving.module_slices import ModuleSlices
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.scaling_buffer import ScalingBuffer
from vllm_jdlora.serving.step_planner import StepPlanner
from vllm_jdlora.serving.step_requests import StepRequests

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.jdlora")


class JDLoRAModelManager(BaseSlotsManager):
    """Serves compressed adapters of one collection, in one or more revisions, beside plain ones.

    Attributes:
        compressed: the compressed adapters.
    """

    def __init__(self, *, lora_config: Any, vllm_config: Any, **kwargs: Any):
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        if options is None or None in (options.scaling_slots, options.plain_slots, options.base_slots):
            raise JDLoRAError("the worker got no serving options: start vLLM with --lora-compression jd")
        assert options.scaling_slots and options.base_slots
        collection = open_revision(options.collection, options.revision)
        manifest = collection.manifest
        super().__init__(options, manifest.quantize, lora_config=lora_config, vllm_config=vllm_config, **kwargs)
        slices = ModuleSlices.of(self, manifest)
        scalings = ScalingBuffer(
            options.scaling_slots,
            slices.rows,
            lora_config.max_lora_rank,
            diagonal=manifest.method == "diag",
            dtype=self._punica.sigma_dtype or self.lora_config.lora_dtype,
            device=self.device,
            by_columns=self._punica.sigma_by_columns,
        )
        self._set_up(CollectionRevisions(collection, options.arrivals), scalings, options.base_slots)
        self._attach_layers(slices)
        # Other workers of one engine would have to agree on which adapters cannot be read.
        self.runs_alone = vllm_config.parallel_config.world_size == 1
        reader = BaseReader(collection, slices)
        self._serve(slices, reader)
        self.fill_base_slots(reader, manifest.clusters)
        logger.info(
            "Compressed LoRA: %d adapters in %d clusters of rank %d, %d scaling slots (%.1f MiB), %d base slots, "
            "%d plain slots",
            len(manifest.adapters),
            manifest.clusters,
            manifest.rank,
            scalings.slots,
            (scalings.slots + 1) * scalings.row_bytes / 2**20,
            options.base_slots,
            options.plain_slots,
        )

    @property
    def collection(self) -> Collection:
        """The newest revision."""
        return self.compressed.revisions.newest

    def _set_up(self, revisions: CollectionRevisions, scalings: ScalingBuffer, base_slots: int) -> None:
        self._clock = LoadClock()
        self.compressed = CompressedAdapters(revisions, scalings, self._clock)
        self._bases = ResidentBases(base_slots, self._write_base)
        directory, slots = self.compressed.directory, self.compressed.slots
        self._planner = StepPlanner(directory, slots, self._bases, self._punica, self._place_of_other)
        self.compressed.moved = self._planner.forget
        self._dummies: set[int] = set()
        self.runs_alone = True
        self.failed: tuple[int, tuple[int, ...]] = (0, ())
        self._failures = 0

    def _attach_layers(self, slices: ModuleSlices) -> None:
        """Give each wrapped layer its rows of the Σ buffer."""
        for name, module in self.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                raise JDLoRAError(
                    f"{name} ({type(module).__name__}) is not a linear LoRA layer: leave it out of "
                    "--lora-target-modules; adapters that target it are not served with compression"
                )
            sigma = self.compressed.scalings.sigma[:, slices.rows_of(name)]
            module.set_mapping(self._punica.for_layer(name, module, sigma))

    # --- the collection -------------------------------------------------------------------------------------------

    def load_collection(self, path: str, revision: str, beside: bool = False) -> dict[str, Any]:
        """Serve another revision of the collection to new requests from now on.

        With the same bases it takes effect at once, and requests for earlier revisions keep their meaning. So they do
        with other bases that come beside those of the newest revision; only of bases older than these nothing may be
        running. Otherwise nothing may be running at all: every earlier revision and every arrival is forgotten, and
        the device's buffers get the new bases where the old ones lie.

        Args:
            path: the collection's folder.
            revision: that it has.
            beside: other bases are to go into free base slots.

        Returns:
            ``revision``, ``adapters``, ``clusters``, ``revisions`` (how many are served), ``bases`` (``kept``,
            ``beside`` or ``replaced``) and ``seconds``.

        Raises:
            JDLoRAError: the collection cannot be read or does not fit this server; then nothing has changed.
        """
        before = self._clock.seconds
        with self._clock:
            collection = open_revision(path, revision)
            if collection.manifest.shares_bases_with(self.collection.manifest):
                bases = "kept"
                self.compressed.revisions.add(collection)
                self.compressed.drop_old_revisions(self._planner.lora_ids)
            elif beside:
                bases = "beside"
                self._serve_beside(collection, *self._fit(collection))
            else:
                bases = "replaced"
                slices, reader = self._fit(collection)
                self.compressed.drop_everything()
                self.compressed.revisions.replace(collection)
                self._serve(slices, reader)
        manifest = collection.manifest
        logger.info("Compressed LoRA: revision %s, %d adapters, bases %s", revision, len(manifest.adapters), bases)
        return {
            "revision": revision,
            "adapters": len(manifest.adapters),
            "clusters": manifest.clusters,
            "revisions": len(self.compressed.revisions),
            "bases": bases,
            "seconds": self._clock.seconds - before,
        }

    def _fit(self, collection: Collection) -> tuple[ModuleSlices, BaseReader]:
        """What brings a collection into the buffers that there are; all of its bases have been read."""
        try:
            manifest, served = collection.manifest, self.collection.manifest
            if manifest.method != served.method:
                raise JDLoRAError(f"{collection.path} is JD-{manifest.method} and this server has JD-{served.method}")
            if manifest.rank > (widest := self.lora_config.max_lora_rank):
                raise JDLoRAError(
                    f"{collection.path} has rank {manifest.rank} and this server has buffers for {widest}"
                )
            if self._eight_bit and STORED.get(manifest.quantize) != self._eight_bit[1]:
                kind = "not quantised" if manifest.quantize == "none" else manifest.quantize
                raise JDLoRAError(
                    f"the bases of {collection.path} are {kind} and this server has buffers for {served.quantize} "
                    "(--jd-base-bits 16 takes every kind)"
                )
            slices = ModuleSlices.of(self, manifest)
            reader = BaseReader(collection, slices)
            reader.check()
        except JDLoRAError as error:
            raise JDLoRAError(f"{error}. Nothing was changed; restart the server to serve this collection") from error
        return slices, reader

    def _serve(self, slices: ModuleSlices, reader: BaseReader) -> None:
        clusters = self.collection.manifest.clusters
        self._readers = {range(clusters): reader}
        self.compressed.scalings.lay_out(slices, self.collection.manifest.rank)
        self._bases.load(clusters)

    def _serve_beside(self, collection: Collection, slices: ModuleSlices, reader: BaseReader) -> None:
        if not self.compressed.scalings.is_laid_out(slices, collection.manifest.rank):
            raise JDLoRAError(
                f"{collection.path} has other modules or another rank than what is served: its scalings cannot lie "
                "beside those that are there. Nothing was changed"
            )
        for numbers in self.compressed.drop_other_bases():
            self._bases.drop(numbers)
            del self._readers[numbers]
        numbers = self._bases.numbers_beside(collection.manifest.clusters)
        self._readers[numbers] = reader
        try:
            self._bases.load_beside(numbers)
        except BaseException:
            del self._readers[numbers]
            raise
        self.compressed.revisions.add_beside(collection, numbers)

    def _write_base(self, slot: int, base: int) -> int:
        numbers, reader = next(item for item in self._readers.items() if base in item[0])
        with self._clock:
            self.write_base(reader, slot, base - numbers.start)
        return reader.bytes_of_a_cluster(1 if self._eight_bit else self.lora_config.lora_dtype.itemsize)

    # --- adapters -------------------------------------------------------------------------------------------------

    def add_dummy(self, lora_id: int) -> bool:
        """A compressed adapter without weights, for warm-up and graph capture."""
        if lora_id in self._dummies:
            return False
        self._dummies.add(lora_id)
        return True

    def is_registered(self, lora_id: int) -> bool:
        """Whether a plain adapter or a dummy is registered, in O(1)."""
        return lora_id in self._dummies or lora_id in self._registered_adapters

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self.compressed:
            return self.compressed.activate(lora_id)
        return lora_id in self._dummies or self._activate_plain(lora_id)

    def _activate_plain(self, lora_id: int) -> bool:
        self._registered_adapters.touch(lora_id)
        activated = super().activate_adapter(lora_id)
        if activated:
            self._planner.forget()
        return activated

    def _deactivate_adapter(self, lora_id: int) -> None:
        self._planner.forget()
        super()._deactivate_adapter(lora_id)

    def remove_adapter(self, adapter_id: int) -> bool:
        if self.compressed.unbind(adapter_id):
            return True
        if adapter_id in self._dummies:
            self._dummies.discard(adapter_id)
            return True
        return super().remove_adapter(adapter_id)

    def pin_adapter(self, lora_id: int) -> bool:
        if lora_id not in self.compressed:
            return super().pin_adapter(lora_id)
        self.compressed.pin(lora_id)
        return True

    def remove_all_adapters(self) -> None:
        """Forget every adapter; the bases and the Σ of a collection's adapters that are resident stay."""
        self.compressed.clear()
        self._dummies.clear()
        for lora_id in self.plain_adapters():
            super().remove_adapter(lora_id)

    def list_adapters(self) -> dict[int, Any]:
        plain = {i: self._registered_adapters.cache[i] for i in self.plain_adapters()}
        return {**plain, **dict.fromkeys(self.compressed.directory), **dict.fromkeys(self._dummies)}

    def get_adapter(self, adapter_id: int) -> Any:
        index = self.compressed.directory.index(adapter_id)
        return super().get_adapter(adapter_id) if index is None else self.compressed.directory.adapter(index)

    # --- the step -------------------------------------------------------------------------------------------------

    def touch_resident(self, requests: abc.Collection[LoRARequest]) -> list[LoRARequest]:
        """Mark what is resident as just used, before anything is loaded over it; the requests that need more."""
        return self.compressed.directory.touch(requests)

    def is_planned(self, step: StepRequests) -> bool:
        """Whether the step before was this one and nothing has moved; if so its adapters count as just used."""
        plain = self._planner.touch_if_planned(step)
        for lora_id in plain or ():
            self._active_adapters.touch(lora_id)
            self._registered_adapters.touch(lora_id)
        return plain is not None

    def bring_bases(self, requests: abc.Collection[LoRARequest]) -> dict[int, JDLoRAError]:
        """Bring the bases of a step's adapters, where not all are resident.

        Returns:
            For each LoRA id whose bases cannot be read, why; such an id means nothing any more.
        """
        if self._bases.all_resident:
            return {}
        directory = self.compressed.directory
        base_of = {
            request.lora_int_id: directory.adapter(index).base
            for request in requests
            if (index := directory.index(request.lora_int_id)) is not None
        }
        needed = np.unique(np.fromiter(base_of.values(), dtype=np.int64))
        failed = self._bases.bring(needed) if len(needed) <= self._bases.capacity else {}
        lost = {lora_id: failed[base] for lora_id, base in base_of.items() if base in failed}
        for lora_id in lost:
            self.compressed.unbind(lora_id)
        return lost

    def note_failed(self, lora_ids: abc.Collection[int]) -> None:
        """Let the base model stand in for these ids in the step to be planned (:mod:`.failed_adapters`)."""
        self._failures += bool(lora_ids)
        self.failed = (self._failures, tuple(lora_ids)) if lora_ids else (0, ())

    def plan(self, step: StepRequests) -> None:
        """Plan a step whose adapters are all active."""
        self._planner.plan(step)

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """vLLM's own way in, by token; real steps come through :meth:`plan`.

        Nothing of vLLM's mapping is made. Its readers are embedding, logits and classification layers, which are
        refused at start-up, and the towers of multimodal models, whose LoRA is refused with the flag that turns it on.
        """
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        starts, lengths = runs(ids)  # a sequence's tokens lie together
        self._planner.plan_runs(ids[starts], lengths)

    def _place_of_other(self, lora_id: int) -> tuple[int, int]:
        """Base and Σ slot of a plain adapter, of a dummy, to which any will do, or of one that could not be read."""
        bases, scalings = self._bases.capacity, self.compressed.scalings
        if lora_id in self._dummies:
            return lora_id % bases, lora_id % scalings.slots
        if lora_id in self.failed[1]:
            return -1, -1
        return bases + self.place_of_plain(lora_id), scalings.identity_slot

    def statistics(self) -> dict[str, Any]:
        """Counts for tests and operators, in O(1); bytes are of this worker's copies to its device."""
        compressed, planner = self.compressed, self._planner
        arrivals = compressed.directory.arrivals
        return {
            "known": len(self.collection.manifest.adapters) + arrivals,
            "bound": len(compressed.directory),
            "resident": len(compressed.slots),
            "arrivals": arrivals,
            "plain": len(self._registered_adapters) - self._lora_bases,
            "revision": self.collection.manifest.revision,
            "revisions": len(compressed.revisions),
            "clusters": self._bases.clusters,
            "resident_bases": len(self._bases),
            "clusters_in_step": planner.clusters_in_step,
            "adapters_in_step": planner.adapters_in_step,
            "sigma_swaps": compressed.loads,
            "sigma_bytes": compressed.loads * compressed.scalings.row_bytes,
            "base_swaps": self._bases.swaps,
            "base_bytes": self._bases.bytes,
            "load_seconds": self._clock.seconds,
            FAILED: self.failed,
            "wrapped_modules": len(self.modules),
            "steps": planner.steps,
            "plans": planner.plans,
        }
