"""The most bytes that each file of a collection can have, by its manifest: a repository may hold anything."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_jdlora.adapter import WEIGHTS_FILE
from vllm_jdlora.collection.schema import BASES_FILE, ERRORS_FILE, MANIFEST_FILE, CollectionManifest
from vllm_jdlora.peft_config import CONFIG_FILE

MANIFEST_BYTES = 1 << 30
_HEADER_BYTES = (32 << 20) + 8
"""What tensor_file.py reads of a safetensors header; configs of adapters are smaller."""
_PLAIN_WEIGHTS_BYTES = 64 << 30
"""What adapter.py reads of an uncompressed adapter: the manifest does not count heads that were trained with it."""
_NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def most_bytes(manifest: CollectionManifest) -> Mapping[str, int]:
    """File → bound, for all that the manifest lists, with forward slashes."""
    n, slices, clusters, rank = len(manifest.adapters), manifest.slices, manifest.clusters, manifest.rank
    number = _NUMBER_BYTES[manifest.dtype]
    quantized = manifest.quantize != "none"
    width = sum(part.d_out + part.d_in for part in slices)
    bases = clusters * rank * (width * (1 if quantized else number) + (2 * 4 * len(slices) if quantized else 0))
    sigma = n * len(slices) * rank * (1 if manifest.method == "diag" else rank) * number
    errors = n * len(slices) * 4 * 2
    tensors = {name: {BASES_FILE: bases, ERRORS_FILE: errors}.get(name, sigma) for name in manifest.files}
    bounds = {MANIFEST_FILE: MANIFEST_BYTES} | {name: count + _HEADER_BYTES for name, count in tensors.items()}
    for entry in manifest.plain:
        bounds[f"plain/{entry.name}/{CONFIG_FILE}"] = _HEADER_BYTES
        bounds[f"plain/{entry.name}/{WEIGHTS_FILE}"] = _PLAIN_WEIGHTS_BYTES
    return bounds
