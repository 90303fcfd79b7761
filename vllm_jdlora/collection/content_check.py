"""Every byte of a collection against its digests, and every number of its bases and Σ: finite, or refused.

A server does this when it starts, and the Σ of 100,000 adapters are gigabytes: each file is read once, in pieces that
are still in the core's cache when they are looked at, and files are read at the same time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vllm_jdlora.adapter import content_digest
from vllm_jdlora.collection.schema import ERRORS_FILE, CollectionManifest
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.tensor_file import TensorFile

_PIECE_BYTES = 1 << 20
# Bits of a float as a whole number, and the smallest one that is positive and not finite. Without infinities, F8_E4M3
# has one NaN of each sign; whole numbers are always finite.
_BITS: Mapping[str, tuple[Any, Any, int]] = {
    "F32": (np.int32, np.uint32, 0x7F80_0000),
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
}


def check_content(path: Path, manifest: CollectionManifest, files: Mapping[str, TensorFile]) -> None:
    """Check the open tensor files, whose layouts were checked before, and the adapters that are kept uncompressed.

    Raises:
        JDLoRAError: the first file, in the manifest's order, that was changed or holds a number that is not finite.
    """

    def check_plain(name: str, digest: str) -> None:
        if content_digest(path / "plain" / name) != digest:
            raise JDLoRAError(f"{path / 'plain' / name}: was changed after it was written")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as threads:
        tasks = [
            # Errors are NaN where an adapter has nothing.
            threads.submit(_check_file, files[name], digest, finite=name != ERRORS_FILE)
            for name, digest in manifest.files.items()
        ]
        tasks += [threads.submit(check_plain, entry.name, entry.sha256) for entry in manifest.plain]
        try:
            for task in tasks:
                task.result()
        finally:
            threads.shutdown(cancel_futures=True)


def _check_file(file: TensorFile, digest: str, *, finite: bool) -> None:
    """One safetensors file; `collection/stream.py` says how it is laid out."""
    found = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    odd, at = None, 0

    def read(count: int, dtype: str = "") -> bool:
        """Take the next bytes in; whether all numbers in them are finite."""
        nonlocal at
        good = True
        for begin in range(at, at + count, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, at + count - begin)]
            file.read_into(piece, begin)
            found.update(piece)
            good = good and all_finite(piece, dtype)
        at += count
        return good

    first = min((place.begin for place in file.tensors.values()), default=file.identity.size)
    read(first)
    for name, place in file.tensors.items():
        if not read(place.nbytes, place.dtype if finite and odd is None else "") and odd is None:
            odd = name
    if found.hexdigest() != digest:
        raise JDLoRAError(f"{file.path}: was changed after it was written; compress the adapters again")
    if odd is not None:
        raise JDLoRAError(f"{file.path}: {odd} holds NaN or infinity")


def all_finite(piece: memoryview, dtype: str) -> bool:
    """Whether all numbers are, by their bits: positive floats are ordered as signed whole numbers and negative ones as
    unsigned ones, so the two largest tell."""
    if dtype not in _BITS:
        return True
    signed, unsigned, odd = _BITS[dtype]
    sign = 1 << (8 * np.dtype(signed).itemsize - 1)
    return bool(np.frombuffer(piece, signed).max() < odd and np.frombuffer(piece, unsigned).max() < odd + sign)
