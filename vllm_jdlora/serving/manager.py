"""The LoRA manager of a worker: cluster bases stay on the device, Σ come and go.

vLLM's own ``LRUCacheLoRAModelManager`` manages the *bases*: cluster k is a pinned pseudo-LoRA in a LoRA slot with
``lora_a = V_k`` and ``lora_b = U_k``, and plain adapters use the slots that are left. So layer replacement, packing
of q/k/v and gate/up and tensor-parallel slicing stay vLLM's. New are the Σ buffer, the map from an adapter to its
(cluster, Σ slot), and one step between shrink and expand. With bases of 8 bits clusters take no LoRA slots: they lie
in buffers of our own beside vLLM's, which then hold plain adapters only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import abc
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.platforms import current_platform

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.quantize import STORED
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.token_tiles import runs
from vllm_jdlora.serving.adapter_directory import AdapterDirectory
from vllm_jdlora.serving.module_slices import ModuleSlices
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.punica import JDPunica
from vllm_jdlora.serving.scaling_slots import ScalingSlots
from vllm_jdlora.serving.step_planner import StepPlanner
from vllm_jdlora.serving.step_requests import StepRequests

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.jdlora")

FIRST_BASE_ID = 1 << 30
"""LoRA ids of the bases start here; API servers count adapters up from 1."""


class JDLoRAModelManager(LRUCacheLoRAModelManager):
    """Serves compressed adapters of one collection beside plain ones.

    Attributes:
        collection: the collection, memory-mapped.
        sigma: [S + 1, rows, R, R], or [S + 1, rows, R] of diagonals, on the device: row s is the Σ of the adapter in
            slot s for every module slice, row S is the identity, through which plain adapters of any rank up to R
            pass unchanged.
    """

    def __init__(self, *, lora_config: Any, vllm_config: Any, **kwargs: Any):
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        if options is None or options.scaling_slots is None or options.plain_slots is None:
            raise JDLoRAError("the worker got no serving options: start vLLM with --lora-compression jd")
        self.collection = Collection.open(options.collection, verify=False)
        if self.collection.manifest.revision != options.revision:
            raise JDLoRAError(
                f"{options.collection} is revision {self.collection.manifest.revision}, the server was started with "
                f"{options.revision}: the collection was replaced meanwhile, start again"
            )
        manifest = self.collection.manifest
        clusters = manifest.clusters
        # On CPU the kernel reads Σ in fp32; bases come in this dtype and are laid down in the model's.
        dtype = torch.float32 if current_platform.is_cpu() else lora_config.lora_dtype
        eight_bit = options.base_bits == 8
        # Both are wanted inside super().__init__. Clusters are LoRAs of vLLM unless they are of 8 bits.
        self._eight_bit = (clusters, STORED[manifest.quantize]) if eight_bit else None
        self._lora_clusters = 0 if eight_bit else clusters
        slots = self._lora_clusters + options.plain_slots
        super().__init__(
            lora_config=dataclasses.replace(
                lora_config,
                max_loras=slots,
                max_cpu_loras=max(slots, self._lora_clusters + (lora_config.max_cpu_loras or 0)),
                lora_dtype=dtype,
            ),
            vllm_config=vllm_config,
            **kwargs,
        )
        self._dummies: set[int] = set()
        self._clusters = clusters
        self._scaling_slots = options.scaling_slots
        self._identity_slot = options.scaling_slots
        self._slots = ScalingSlots(options.scaling_slots, len(manifest.adapters))
        self._directory = AdapterDirectory([a.cluster for a in manifest.adapters], self._slots)
        self._planner = StepPlanner(self._directory, self._slots, self._punica, self._place_of_other)
        self._slices = ModuleSlices.of(self, manifest)
        self.sigma = self._attach_sigma(lora_config.max_lora_rank, dtype)
        if eight_bit:
            self._load_bases_of_8_bits()
        else:
            self._load_bases(manifest.rank)
        for adapter in range(min(self._scaling_slots, len(manifest.adapters))):
            self._make_resident(adapter)
        logger.info(
            "Compressed LoRA: %d adapters in %d clusters of rank %d, %d of them resident (%.1f MiB of scalings), "
            "%d plain slots",
            len(manifest.adapters),
            clusters,
            manifest.rank,
            len(self._slots),
            self.sigma.numel() * self.sigma.element_size() / 2**20,
            options.plain_slots,
        )

    # --- construction ---------------------------------------------------------------------------------------------

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        key = self.mm_mapping.language_model[0] if self.supports_mm else next(iter(self.punica_wrapper_mapping))
        if current_platform.is_cpu():
            from vllm_jdlora.serving.punica_cpu import JDPunicaCPU

            self._punica: JDPunica = JDPunicaCPU(
                max_num_batched_tokens,
                self.max_num_seqs,
                self.device,
                vllm_config.compilation_config.static_forward_context,
                vllm_config.model_config.dtype,
            )
        else:
            from vllm_jdlora.serving.punica_gpu import JDPunicaGPU

            self._punica = JDPunicaGPU(
                max_num_batched_tokens,
                self.max_num_seqs,
                self.device,
                self.lora_config.max_loras + (self._eight_bit[0] if self._eight_bit else 0),
                vllm_config.compilation_config.static_forward_context,
                self._eight_bit,
            )
        self.punica_wrapper_mapping[key] = self._punica

    def _attach_sigma(self, rank: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocate the Σ buffer and give each wrapped layer its rows of it."""
        identity = torch.ones(rank) if self.collection.manifest.method == "diag" else torch.eye(rank)
        shape = (self._scaling_slots + 1, self._slices.rows, *identity.shape)
        sigma = torch.zeros(shape, dtype=dtype, device=self.device)
        sigma[self._identity_slot] = identity.to(sigma)
        for name, module in self.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                raise JDLoRAError(
                    f"{name} ({type(module).__name__}) is not a linear LoRA layer: leave it out of "
                    "--lora-target-modules; adapters that target it are not served with compression"
                )
            module.set_mapping(self._punica.for_layer(name, module, sigma[:, self._slices.rows_of(name)]))
        return sigma

    def _load_bases(self, rank: int) -> None:
        """Each cluster becomes a pinned pseudo-LoRA; vLLM packs, slices and copies it to the device."""
        bases = {target: self.collection.basis(slice_name) for target, slice_name in self._slices.targets.items()}
        for cluster in range(self.collection.manifest.clusters):
            lora_id = FIRST_BASE_ID + cluster
            weights = {
                # vLLM folds scalings and packs in place: never hand it the mapped file.
                target: LoRALayerWeights(target, rank, rank, v[cluster].clone(), u[cluster].clone())
                for target, (u, v) in bases.items()
            }
            base = LoRAModel(lora_id, rank, weights)
            super().add_adapter(base)
            super().activate_adapter(lora_id)
            super().pin_adapter(lora_id)
            # A step names bases by their place, and a cluster's place is its number.
            assert self.lora_index_to_id[cluster] == lora_id
            base.loras.clear()  # the device has it; the host copy would cost as much again

    def _load_bases_of_8_bits(self) -> None:
        """Each layer's buffers of 8 bits get the collection's numbers as they are stored."""
        from vllm_jdlora.serving.eight_bit_loading import load_clusters

        targets = self._slices.targets
        for name, layer in self.modules.items():
            parts = self.packed_modules.get(name) or [name]
            stored = [self.collection.quantized_basis(targets[part]) if part in targets else None for part in parts]
            load_clusters(layer, layer.punica_wrapper.module.eight_bit, stored)

    # --- adapters -------------------------------------------------------------------------------------------------

    def add_compressed(self, request: LoRARequest, name: str) -> None:
        """Bind a LoRA id to an adapter of the collection, whatever it meant before."""
        adapter = self.collection.index_of(name)
        self.unbind(request.lora_int_id)
        self._directory.bind(request, adapter)

    def add_dummy(self, lora_id: int) -> bool:
        """A compressed adapter without weights, for warm-up and graph capture."""
        if lora_id in self._dummies:
            return False
        self._dummies.add(lora_id)
        return True

    def is_bound(self, request: LoRARequest) -> bool:
        """Whether a request for a compressed adapter has been seen before, in O(1)."""
        return self._directory.is_bound(request)

    def is_registered(self, lora_id: int) -> bool:
        """Whether a plain adapter or a dummy is registered, in O(1)."""
        return lora_id in self._dummies or lora_id in self._registered_adapters

    def activate_adapter(self, lora_id: int) -> bool:
        adapter = self._directory.adapter(lora_id)
        if adapter is None:
            return lora_id in self._dummies or self._activate_plain(lora_id)
        if adapter in self._slots:
            self._slots.touch(self._slots.slots(np.array([adapter])))
            return False
        self._make_resident(adapter)
        return True

    def _activate_plain(self, lora_id: int) -> bool:
        self._registered_adapters.touch(lora_id)
        activated = super().activate_adapter(lora_id)
        if activated:
            self._planner.forget()
        return activated

    def _deactivate_adapter(self, lora_id: int) -> None:
        self._planner.forget()
        super()._deactivate_adapter(lora_id)

    def _make_resident(self, adapter: int) -> None:
        self._planner.forget()  # first: a copy that fails has evicted an adapter all the same
        slot = self._slots.victim()
        rank, covered = self.collection.manifest.rank, self._slices.covered
        stored = self.collection.sigma(adapter)  # [slices, R, R], or [slices, R]
        values = stored[self._slices.order].to(device=self.sigma.device, dtype=self.sigma.dtype, non_blocking=True)
        if values.ndim == 2:
            self.sigma[slot, covered, :rank] = values
        else:
            self.sigma[slot, covered, :rank, :rank] = values
        self._slots.occupy(adapter, slot)

    def remove_adapter(self, adapter_id: int) -> bool:
        if self.unbind(adapter_id):
            return True
        if adapter_id in self._dummies:
            self._dummies.discard(adapter_id)
            return True
        return super().remove_adapter(adapter_id)

    def unbind(self, lora_id: int) -> bool:
        """Forget what compressed adapter an id means; whether it meant one."""
        adapter = self._directory.forget(lora_id)
        if adapter is None:
            return False
        self._planner.forget()
        # Its Σ stays until the slot is wanted: the name may come back under another id.
        self._slots.unpin(adapter)
        return True

    def pin_adapter(self, lora_id: int) -> bool:
        adapter = self._directory.adapter(lora_id)
        if adapter is None:
            return super().pin_adapter(lora_id)
        self.activate_adapter(lora_id)
        self._slots.pin(adapter)
        return True

    def remove_all_adapters(self) -> None:
        """Forget every adapter; the bases and the Σ that are resident stay."""
        self._directory.clear()
        self._dummies.clear()
        for lora_id in [i for i in self._registered_adapters.cache if i < FIRST_BASE_ID]:
            super().remove_adapter(lora_id)
        self._planner.forget()

    def list_adapters(self) -> dict[int, Any]:
        plain = {i: m for i, m in super().list_adapters().items() if i < FIRST_BASE_ID}
        return {**plain, **dict.fromkeys(self._directory), **dict.fromkeys(self._dummies)}

    def get_adapter(self, adapter_id: int) -> Any:
        adapter = self._directory.adapter(adapter_id)
        if adapter is None:
            return super().get_adapter(adapter_id)
        return self.collection.manifest.adapters[adapter]

    def unwrapped_targets(self, lora: LoRAModel) -> list[str]:
        """Modules that a plain adapter wants to change and that are not wrapped on this server."""
        served = set(self.modules)
        for packed, children in self.packed_modules.items():
            if packed in self.modules:
                served.update(children)
        return sorted(set(lora.loras) - served)

    # --- the step -------------------------------------------------------------------------------------------------

    def touch_resident(self, requests: abc.Collection[LoRARequest]) -> list[LoRARequest]:
        """Mark what is resident as just used, before anything is loaded over it; the requests that need more."""
        return self._directory.touch(requests)

    def is_planned(self, step: StepRequests) -> bool:
        """Whether the step before was this one and nothing has moved; if so its adapters count as just used."""
        plain = self._planner.touch_if_planned(step)
        for lora_id in plain or ():
            self._active_adapters.touch(lora_id)
            self._registered_adapters.touch(lora_id)
        return plain is not None

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
        """Base and Σ slot of a plain adapter, or of a dummy."""
        if lora_id in self._dummies:
            return lora_id % self._clusters, lora_id % self._scaling_slots
        slot = self.lora_index_to_id.index(lora_id, self._lora_clusters)
        return self._clusters - self._lora_clusters + slot, self._identity_slot

    def statistics(self) -> dict[str, int]:
        """Counts for tests and operators."""
        return {
            "known": len(self._directory),
            "resident": len(self._slots),
            "clusters": self._clusters,
            "plain": sum(i < FIRST_BASE_ID for i in self._registered_adapters.cache),
            "wrapped_modules": len(self.modules),
            "steps": self._planner.steps,
            "plans": self._planner.plans,
        }
