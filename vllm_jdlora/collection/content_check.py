"""Every byte of a collection against its digests, and every number of its bases and Σ: finite, or refused.

A server does this when it starts, and the Σ of 100,000 adapters are gigabytes: each file is read once, in pieces that
are still in the core's cache when they are looked at, and files are read at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vllm_jdlora.adapter import content_digest
from vllm_jdlora.collection.schema import ERRORS_FILE, CollectionManifest
from vllm_jdlora.errors import JDLoRAError

_PIECE_BYTES = 1 << 20
# Bits of a float as a whole number, and the smallest one that is positive and not finite. Without infinities, F8_E4M3
# has one NaN of each sign; whole numbers are always finite.
_BITS: Mapping[str, tuple[Any, Any, int]] = {
    "F32": (np.int32, np.uint32, 0x7F80_0000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
}


def check_content(path: Path, manifest: CollectionManifest) -> None:
    """Check the tensor files, whose layouts were checked before, and the adapters that are kept uncompressed.

    Raises:
        JDLoRAError: the first file, in the manifest's order, that was changed or holds a number that is not finite.
    """

    def check_plain(name: str, digest: str) -> None:
        if content_digest(path / "plain" / name) != digest:
            raise JDLoRAError(f"{path / 'plain' / name}: was changed after it was written")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as threads:
        tasks = [
            # Errors are NaN where an adapter has nothing.
            threads.submit(_check_file, path / name, digest, finite=name != ERRORS_FILE)
            for name, digest in manifest.files.items()
        ]
        tasks += [threads.submit(check_plain, entry.name, entry.sha256) for entry in manifest.plain]
        try:
            for task in tasks:
                task.result()
        finally:
            threads.shutdown(cancel_futures=True)


def _check_file(file: Path, digest: str, *, finite: bool) -> None:
    """One safetensors file; `collection/stream.py` says how it is laid out."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    odd = None
    try:
        with open(file, "rb") as stream:
            length = stream.read(8)
            header = stream.read(int.from_bytes(length, "little"))
            found.update(length + header)
            for name, dtype, size in _tensors(header):
                for start in range(0, size, _PIECE_BYTES):
                    piece = buffer[: min(_PIECE_BYTES, size - start)]
                    if stream.readinto(piece) < len(piece):
                        raise ValueError("it ends too early")
                    found.update(piece)
                    if finite and odd is None and not all_finite(piece, dtype):
                        odd = name
            found.update(stream.read())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JDLoRAError(f"{file}: cannot be read ({error})") from error
    if found.hexdigest() != digest:
        raise JDLoRAError(f"{file}: was changed after it was written; compress the adapters again")
    if odd is not None:
        raise JDLoRAError(f"{file}: {odd} holds NaN or infinity")


def _tensors(header: bytes) -> list[tuple[str, str, int]]:
    """(name, dtype, bytes) of each tensor as they follow one another in the file."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, e["dtype"], e["data_offsets"][1] - e["data_offsets"][0]) for name, e in ordered]


def all_finite(piece: memoryview, dtype: str) -> bool:
    """Whether all numbers are, by their bits: positive floats are ordered as signed whole numbers and negative ones as
    unsigned ones, so the two largest tell."""
    if dtype not in _BITS:
        return True
    signed, unsigned, odd = _BITS[dtype]
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    return bool(np.frombuffer(piece, signed).max() < odd and np.frombuffer(piece, unsigned).max() < odd + sign)
