"""The LoRA manager of a worker: cluster bases stay on the device, Σ come and go.

vLLM's own ``LRUCacheLoRAModelManager`` manages the *bases*: cluster k is a pinned pseudo-LoRA in a LoRA slot with
``lora_a = V_k`` and ``lora_b = U_k``, and plain adapters use the slots that are left. So layer replacement, packing
of q/k/v and gate/up and tensor-parallel slicing stay vLLM's. New are the Σ buffer, the map from an adapter to its
(cluster, Σ slot), and one step between shrink and expand.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.platforms import current_platform

from vllm_jdlora.collection import Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.token_tiles import runs
from vllm_jdlora.serving.module_slices import ModuleSlices
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.punica import JDPunica
from vllm_jdlora.serving.scaling_slots import ScalingSlots

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
        # On CPU the kernel works in fp32; buffers in the model's bf16 would be cast again at every layer and step.
        dtype = torch.float32 if current_platform.is_cpu() else lora_config.lora_dtype
        slots = clusters + options.plain_slots
        super().__init__(
            lora_config=dataclasses.replace(
                lora_config,
                max_loras=slots,
                max_cpu_loras=max(slots, clusters + (lora_config.max_cpu_loras or 0)),
                lora_dtype=dtype,
            ),
            vllm_config=vllm_config,
            **kwargs,
        )
        self._adapter_of_id: dict[int, int] = {}
        self._dummies: set[int] = set()
        self._scaling_slots = options.scaling_slots
        self._identity_slot = options.scaling_slots
        self._slots = ScalingSlots(options.scaling_slots)
        self._cluster_of = [a.cluster for a in manifest.adapters]
        self._sigma_changed = False
        self._slices = ModuleSlices.of(self, manifest)
        self.sigma = self._attach_sigma(lora_config.max_lora_rank, dtype)
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
            )
        else:
            from vllm_jdlora.serving.punica_gpu import JDPunicaGPU

            self._punica = JDPunicaGPU(
                max_num_batched_tokens,
                self.max_num_seqs,
                self.device,
                self.lora_config.max_loras,
                vllm_config.compilation_config.static_forward_context,
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
            base.loras.clear()  # the device has it; the host copy would cost as much again

    # --- adapters -------------------------------------------------------------------------------------------------

    def add_compressed(self, lora_id: int, name: str) -> bool:
        """Bind a LoRA id to an adapter of the collection; whether it was new."""
        if lora_id in self._adapter_of_id:
            return False
        self._adapter_of_id[lora_id] = self.collection.index_of(name)
        return True

    def add_dummy(self, lora_id: int) -> bool:
        """A compressed adapter without weights, for warm-up and graph capture."""
        if lora_id in self._dummies:
            return False
        self._dummies.add(lora_id)
        return True

    def is_compressed(self, lora_id: int) -> bool:
        return lora_id in self._adapter_of_id or lora_id in self._dummies

    def knows(self, lora_id: int) -> bool:
        """Whether an adapter is registered, in O(1)."""
        return self.is_compressed(lora_id) or lora_id in self._registered_adapters

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self._dummies:
            return True
        adapter = self._adapter_of_id.get(lora_id)
        if adapter is None:
            return super().activate_adapter(lora_id)
        if self._slots.touch(adapter) is not None:
            return False
        self._make_resident(adapter)
        return True

    def _make_resident(self, adapter: int) -> None:
        slot = self._slots.victim()
        rank, covered = self.collection.manifest.rank, self._slices.covered
        stored = self.collection.sigma(adapter)  # [slices, R, R], or [slices, R]
        values = stored[self._slices.order].to(device=self.sigma.device, dtype=self.sigma.dtype, non_blocking=True)
        if values.ndim == 2:
            self.sigma[slot, covered, :rank] = values
        else:
            self.sigma[slot, covered, :rank, :rank] = values
        self._slots.occupy(adapter, slot)
        self._sigma_changed = True

    def remove_adapter(self, adapter_id: int) -> bool:
        if adapter_id in self._dummies:
            self._dummies.discard(adapter_id)
            return True
        adapter = self._adapter_of_id.pop(adapter_id, None)
        if adapter is None:
            return super().remove_adapter(adapter_id)
        # Its Σ stays until the slot is wanted: the name may come back under another id.
        self._slots.unpin(adapter)
        return True

    def pin_adapter(self, lora_id: int) -> bool:
        adapter = self._adapter_of_id.get(lora_id)
        if adapter is None:
            return super().pin_adapter(lora_id)
        self.activate_adapter(lora_id)
        self._slots.pin(adapter)
        return True

    def remove_all_adapters(self) -> None:
        """Forget every adapter; the bases and the Σ that are resident stay."""
        self._adapter_of_id.clear()
        self._dummies.clear()
        for lora_id in [i for i in self._registered_adapters.cache if i < FIRST_BASE_ID]:
            super().remove_adapter(lora_id)
        self._last_mapping = None
        self._last_slot_layout = None

    def list_adapters(self) -> dict[int, Any]:
        plain = {i: m for i, m in super().list_adapters().items() if i < FIRST_BASE_ID}
        return {**plain, **dict.fromkeys(self._adapter_of_id), **dict.fromkeys(self._dummies)}

    def get_adapter(self, adapter_id: int) -> Any:
        if adapter_id in self._adapter_of_id:
            return self.collection.manifest.adapters[self._adapter_of_id[adapter_id]]
        return super().get_adapter(adapter_id)

    def unwrapped_targets(self, lora: LoRAModel) -> list[str]:
        """Modules that a plain adapter wants to change and that are not wrapped on this server."""
        served = set(self.modules)
        for packed, children in self.packed_modules.items():
            if packed in self.modules:
                served.update(children)
        return sorted(set(lora.loras) - served)

    # --- the step -------------------------------------------------------------------------------------------------

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        if self._sigma_changed:
            # vLLM skips an unchanged mapping; it cannot see that a Σ slot got another adapter.
            self._last_mapping = None
            self._sigma_changed = False
        super().set_adapter_mapping(mapping)

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        bases, slots = self._bases_and_slots(mapping.index_mapping)
        prompt_bases, _ = self._bases_and_slots(mapping.prompt_mapping)
        of_bases = LoRAMapping((), tuple(prompt_bases.tolist()), mapping.is_prefill, mapping.type)
        # An array, not a tuple: numbers of thousands of tokens would be boxed here and unboxed by its one reader.
        of_bases.index_mapping = bases
        super()._set_adapter_mapping(of_bases)
        self._punica.update_scaling_slots(slots)

    def _bases_and_slots(self, lora_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """LoRA id of the base (0 for none) and Σ slot (−1 for none) of each token; O(tokens)."""
        ids = np.asarray(lora_ids, dtype=np.int64)
        starts, lengths = runs(ids)  # a sequence's tokens lie together
        pairs = [self._base_and_slot(lora_id) for lora_id in ids[starts].tolist()]
        bases, slots = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return np.repeat(bases, lengths), np.repeat(slots, lengths)

    def _base_and_slot(self, lora_id: int) -> tuple[int, int]:
        adapter = self._adapter_of_id.get(lora_id)
        if adapter is not None:
            return FIRST_BASE_ID + self._cluster_of[adapter], self._slots.slot(adapter)
        if lora_id in self._dummies:
            return FIRST_BASE_ID + lora_id % self.collection.manifest.clusters, lora_id % self._scaling_slots
        return (lora_id, self._identity_slot) if lora_id > 0 else (0, -1)

    def statistics(self) -> dict[str, int]:
        """Counts for tests and operators."""
        return {
            "known": len(self._adapter_of_id),
            "resident": len(self._slots),
            "clusters": self.collection.manifest.clusters,
            "plain": sum(i < FIRST_BASE_ID for i in self._registered_adapters.cache),
            "wrapped_modules": len(self.modules),
        }
