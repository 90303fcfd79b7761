"""A cluster's bases as vLLM takes LoRA weights, or as the buffers of 8 bits take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.io import QuantizedBasis
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.module_slices import ModuleSlices


class BaseReader:
    """Reads one cluster at a time from a collection's files."""

    def __init__(self, collection: Collection, slices: ModuleSlices):
        self._collection, self._targets = collection, slices.targets

    def as_lora(self, cluster: int, lora_id: int) -> LoRAModel:
        """A cluster as a LoRA with ``lora_a = V`` and ``lora_b = U``."""
        rank = self._collection.manifest.rank
        weights = {target: LoRALayerWeights(target, rank, rank, *self._v_and_u(target, cluster)) for target in self}
        return LoRAModel(lora_id, rank, weights)

    def into_8_bits(self, cluster: int, slot: int, layers: Mapping[str, Any], packed: Mapping[str, list[str]]) -> None:
        """Each layer's buffers of 8 bits get a cluster's numbers as they are stored.

        Args:
            cluster: of the collection, a quantised one.
            slot: row of the buffers.
            layers: LoRA layers by the model's name; their ``punica_wrapper`` has the buffers.
            packed: name of a packed layer → names of its parts.
        """
        for name, layer in layers.items():
            parts = [self._stored(part, cluster) for part in packed.get(name) or [name]]
            layer.punica_wrapper.load_8_bits(layer, parts, slot)

    def bytes_of_a_cluster(self, itemsize: int) -> int:
        """Of its bases in all modules, before tensor parallelism. itemsize: bytes of a number on the device."""
        manifest = self._collection.manifest
        return itemsize * manifest.rank * sum(part.d_out + part.d_in for part in manifest.slices)

    def check(self) -> None:
        """Read everything once.

        Raises:
            JDLoRAError: a value that is not finite.
        """
        quantised = self._collection.manifest.quantize != "none"
        for name in self._targets.values():
            read = self._collection.quantized_basis if quantised else self._collection.basis
            stored: tuple[torch.Tensor, ...] = read(name)
            if not all(bool(torch.isfinite(part.float()).all()) for part in stored):
                raise JDLoRAError(
                    f"{self._collection.path}: the bases of {name} hold NaN or infinity; compress the adapters again"
                )

    def __iter__(self) -> Any:
        return iter(self._targets)

    def _v_and_u(self, target: str, cluster: int) -> tuple[torch.Tensor, torch.Tensor]:
        u, v = self._collection.basis(self._targets[target], [cluster])
        return v[0], u[0]

    def _stored(self, target: str, cluster: int) -> QuantizedBasis | None:
        name = self._targets.get(target)
        return None if name is None else self._collection.quantized_basis(name, [cluster]).at(0)
