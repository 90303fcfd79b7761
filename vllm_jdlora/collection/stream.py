"""Write a safetensors file piece by piece: header first, then each tensor's bytes, never all of them in memory.

The format (github.com/huggingface/safetensors): eight bytes of header length, little-endian; a JSON object of
name → dtype, shape and byte offsets, padded with blanks to a multiple of eight; the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def write_streamed(
    file: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write `file`; its SHA-256.

    layout: dtype and shape of each tensor, in the order in which they lie in the file. pieces: their values in that
    order, cut where it suits; each piece belongs to one tensor and has its dtype. metadata: of the file's header.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    written = 0
    with open(file, "wb") as out:
        for block in (len(text).to_bytes(8, "little"), text):
            out.write(block)
            digest.update(block)
        for piece in pieces:
            data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            out.write(data)
            digest.update(data)
            written += len(data)
    if written != end:
        raise ValueError(f"{file}: {written} bytes were given for tensors of {end}")
    return digest.hexdigest()
