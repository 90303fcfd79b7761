"""vLLM's LoRA manager with the clusters' bases in its LoRA slots, or beside them, and plain adapters in the rest.

Base slot k is a pinned pseudo-LoRA in LoRA slot k with ``lora_a = V`` and ``lora_b = U`` of a cluster. So layer
replacement, packing of q/k/v and gate/up and tensor-parallel slicing stay vLLM's. Bases of 8 bits take no LoRA slots:
they lie in buffers of our own beside vLLM's, which then hold plain adapters only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.platforms import current_platform

from vllm_jdlora.collection.quantize import STORED
from vllm_jdlora.serving.base_loading import BaseReader
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.punica import JDPunica

FIRST_BASE_ID = 1 << 30
"""LoRA ids of the base slots start here; API servers count adapters up from 1."""


class BaseSlotsManager(LRUCacheLoRAModelManager):
    """Knows slots, and not what a compressed adapter is."""

    def __init__(self, options: ServingOptions, quantize: str, *, lora_config: Any, vllm_config: Any, **kwargs: Any):
        """
        Args:
            options: resolved.
            quantize: how the collection's bases are stored.
            lora_config: vLLM's; its slots are counted anew.
            vllm_config: vLLM's.
            kwargs: for vLLM's manager.
        """
        assert options.base_slots and options.plain_slots
        # Wanted inside super().__init__.
        self._eight_bit = (options.base_slots, STORED[quantize]) if options.base_bits == 8 else None
        self._lora_bases = 0 if self._eight_bit else options.base_slots
        slots = self._lora_bases + options.plain_slots
        super().__init__(
            lora_config=dataclasses.replace(
                lora_config,
                max_loras=slots,
                max_cpu_loras=max(slots, self._lora_bases + (lora_config.max_cpu_loras or 0)),
                # On CPU bases come in fp32 and are laid down in the model's dtype.
                lora_dtype=torch.float32 if current_platform.is_cpu() else lora_config.lora_dtype,
            ),
            vllm_config=vllm_config,
            **kwargs,
        )

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
                self._eight_bit,
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

    def write_base(self, reader: BaseReader, slot: int, cluster: int) -> None:
        """Put a cluster's bases into a base slot, in place; slots are filled for the first time in their order."""
        if self._eight_bit:
            reader.into_8_bits(cluster, slot, self.modules, self.packed_modules)
            return
        lora_id = FIRST_BASE_ID + slot
        base = reader.as_lora(cluster, lora_id)
        super().remove_adapter(lora_id)
        super().add_adapter(base)
        super().activate_adapter(lora_id)
        super().pin_adapter(lora_id)
        # A step names bases by their place. Slots below are taken, those above are plain adapters'.
        assert self.lora_index_to_id[slot] == lora_id
        base.loras.clear()  # the device has it; the host copy would cost as much again

    def fill_base_slots(self, reader: BaseReader, first: int) -> None:
        """Put any bases into the slots from `first` on, which wait for others': vLLM gives empty ones to adapters."""
        for slot in range(first, self._lora_bases):
            self.write_base(reader, slot, 0)

    def plain_adapters(self) -> list[int]:
        """LoRA ids of the plain adapters on the host, the least recently used first."""
        return [lora_id for lora_id in self._registered_adapters.cache if lora_id < FIRST_BASE_ID]

    def place_of_plain(self, lora_id: int) -> int:
        """Number of an active plain adapter's LoRA slot among those that are not bases'."""
        return self.lora_index_to_id.index(lora_id, self._lora_bases) - self._lora_bases

    def unwrapped_targets(self, lora: LoRAModel) -> list[str]:
        """Modules that a plain adapter wants to change and that are not wrapped on this server."""
        served = set(self.modules)
        for packed, children in self.packed_modules.items():
            if packed in self.modules:
                served.update(children)
        return sorted(set(lora.loras) - served)
