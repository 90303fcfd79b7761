"""The most bytes that each file of a collection can have, by its manifest: a repository may hold anything."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_jdlora.adapter import MOST_FILE_BYTES, WEIGHTS_FILE
from vllm_jdlora.collection.io import MANIFEST_BYTES, TORCH_DTYPES
from vllm_jdlora.collection.schema import BASES_FILE, ERRORS_FILE, MANIFEST_FILE, CollectionManifest
from vllm_jdlora.peft_config import CONFIG_FILE
from vllm_jdlora.tensor_file import MAX_HEADER_BYTES

_HEADER_BYTES = MAX_HEADER_BYTES + 8
"""Of a safetensors file; configs of adapters are smaller."""


def most_bytes(manifest: CollectionManifest) -> Mapping[str, int]:
    """File → bound, for all that the manifest lists, with forward slashes."""
    n, slices, clusters, rank = len(manifest.adapters), manifest.slices, manifest.clusters, manifest.rank
    number = TORCH_DTYPES[manifest.dtype].itemsize
    quantized = manifest.quantize != "none"
    width = sum(part.d_out + part.d_in for part in slices)
    bases = clusters * rank * (width * (1 if quantized else number) + (2 * 4 * len(slices) if quantized else 0))
    sigma = n * len(slices) * rank * (1 if manifest.method == "diag" else rank) * number
    errors = n * len(slices) * 4 * 2
    tensors = {name: {BASES_FILE: bases, ERRORS_FILE: errors}.get(name, sigma) for name in manifest.files}
    bounds = {MANIFEST_FILE: MANIFEST_BYTES} | {name: count + _HEADER_BYTES for name, count in tensors.items()}
    for entry in manifest.plain:
        bounds[f"plain/{entry.name}/{CONFIG_FILE}"] = _HEADER_BYTES
        bounds[f"plain/{entry.name}/{WEIGHTS_FILE}"] = MOST_FILE_BYTES
    return bounds
