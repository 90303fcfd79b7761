"""One safetensors file, checked when it is opened and read without being mapped.

A process that touches a mapped file which somebody has truncated meanwhile is ended by the system (SIGBUS), and one
that reads a mapped file which somebody writes over gets a mixture without a sign of it. A read of an open file comes up
short instead, and the file's size and time of change, looked at after the read, tell of any other change. It costs a
row of Σ of 46 KB 16 µs where mapped pages cost 14, and 130 µs where pages that come from a disk cost 440.

The format: ``collection/stream.py``.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import parsed_object, short

MAX_HEADER_BYTES = 32 << 20
"""A hundred thousand tensors' worth; safetensors itself allows a header of 100 MB, which costs gigabytes to parse."""

_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64},
    **{"F64": 64, "I64": 64, "U64": 64},
}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Identity(NamedTuple):
    """What changes when a file's content does."""

    size: int
    mtime_ns: int


class StoredTensor(NamedTuple):
    """Where a tensor lies: its dtype as the format names it, its shape, and its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


class TensorFile:
    """An open file; it stays what it is when another one takes its place in the folder. Closed when it is dropped.

    Attributes:
        path: where it was.
        tensors: its tensors by name, in the order in which they lie in the file.
        metadata: of its header.
        identity: when it was opened, or found unchanged the last time.
    """

    def __init__(self, path: Path):
        """
        Raises:
            JDLoRAError: it cannot be opened, or is not a whole safetensors file.
        """
        self.path = Path(path)
        self._fd = _opened(self.path)
        weakref.finalize(self, os.close, self._fd)
        self.identity = self.now()
        try:
            self.tensors, self.metadata = self._parsed()
        except ValueError as error:
            raise JDLoRAError(f"{self.path}: not a readable safetensors file ({error})") from error

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """A tensor, or its part with index `row` in the first dimension, as a tensor of its own.

        Raises:
            JDLoRAError: the file ends too early by now, or cannot be read.
        """
        place = self.tensors[name]
        if row is None:
            return _tensor(self._fd, self.path, place.dtype, place.shape, place.begin)
        if not 0 <= row < place.shape[0]:
            raise IndexError(f"{self.path}: {name} has {place.shape[0]} rows, not {row}")
        begin = place.begin + row * (place.nbytes // place.shape[0])
        return _tensor(self._fd, self.path, place.dtype, place.shape[1:], begin)

    def read_into(self, buffer: memoryview, begin: int) -> None:
        """Fill a buffer of bytes from the file's byte `begin` on.

        Raises:
            JDLoRAError: the file ends too early by now, or cannot be read.
        """
        _fill(self._fd, self.path, buffer, begin)

    def now(self) -> Identity:
        """The identity that the open file has by now."""
        return _identity(self._fd)

    def digest(self) -> str:
        """SHA-256 of the open file's content.

        Raises:
            JDLoRAError: it cannot be read.
        """
        digest, begin, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
        size = self.now().size
        while begin < size:
            piece = buffer[: min(len(buffer), size - begin)]
            self.read_into(piece, begin)
            digest.update(piece)
            begin += len(piece)
        return digest.hexdigest()

    def _parsed(self) -> tuple[dict[str, StoredTensor], dict[str, str]]:
        """What safetensors 0.8 accepts, and nothing that it does not."""
        size = self.identity.size
        if size < 8:
            raise ValueError("it is too short")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise ValueError(f"its header is said to take {length} bytes")
        text = self._bytes(8, length).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("its header is not a JSON object")
        header = parsed_object(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text by name")
        places = sorted(((_extent(name, entry), name, entry) for name, entry in header.items()), key=lambda p: p[0])
        tensors, end = {}, 0
        for (begin, stop), name, entry in places:
            name.encode()  # half a surrogate pair is no text
            place = _place(name, entry, 8 + length + begin)
            if begin != end or stop - begin != place.nbytes:
                raise ValueError(f"tensor {name[:80]!a} lies at [{begin}, {stop}], which does not fit")
            tensors[name], end = place, stop
        if 8 + length + end != size:
            raise ValueError(f"it has {size - 8 - length} bytes of tensors, its header says {end}")
        return tensors, metadata

    def _bytes(self, begin: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), begin)
        return bytes(buffer)


def read_again(path: Path, identity: Identity, places: Sequence[StoredTensor]) -> list[torch.Tensor]:
    """Tensors of a file that was opened before, without a look at its header.

    Raises:
        JDLoRAError: it is gone, or not what it was.
    """
    fd = _opened(path)
    try:
        tensors = [_tensor(fd, path, *place) for place in places] if _identity(fd) == identity else []
        if _identity(fd) != identity:
            raise JDLoRAError(f"{path}: changed since it was checked; start again")
        return tensors
    finally:
        os.close(fd)


def identity_of(path: Path) -> Identity:
    """Of a file that is there."""
    found = os.stat(path)
    return Identity(found.st_size, found.st_mtime_ns)


def _opened(path: Path) -> int:
    try:
        # A pipe would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL in it
        raise JDLoRAError(f"{path}: not a readable safetensors file ({_told(error)})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise JDLoRAError(f"{path}: not a readable safetensors file (not a regular file)")
    return fd


def _identity(fd: int) -> Identity:
    found = os.fstat(fd)
    return Identity(found.st_size, found.st_mtime_ns)


def _tensor(fd: int, path: Path, dtype: str, shape: tuple[int, ...], begin: int) -> torch.Tensor:
    try:
        tensor = torch.empty(shape, dtype=_TORCH[dtype])
    except RuntimeError as error:
        raise JDLoRAError(f"{path}: there is no memory for a tensor {list(shape)}") from error
    if tensor.numel():
        _fill(fd, path, tensor.reshape(-1).view(torch.uint8).numpy().data, begin)
    return tensor


def _fill(fd: int, path: Path, buffer: memoryview, begin: int) -> None:
    while buffer:
        try:
            count = os.preadv(fd, [buffer], begin)
        except OSError as error:
            raise JDLoRAError(f"{path}: cannot be read ({_told(error)})") from error
        if not count:
            raise JDLoRAError(f"{path}: ends too early: it was truncated after it was opened; put it back")
        buffer, begin = buffer[count:], begin + count


def _extent(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:80]!a} is not described by dtype, shape and data_offsets")
    extent = entry["data_offsets"]
    if not _whole_numbers(extent) or len(extent) != 2:
        raise ValueError(f"tensor {name[:80]!a} has odd data_offsets")
    return extent[0], extent[1]


def _place(name: str, entry: Mapping[str, Any], begin: int) -> StoredTensor:
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name[:80]!a} has the dtype {short(dtype)}")
    if not _whole_numbers(shape) or len(shape) > 64 or math.prod(d for d in shape if d) >= 1 << 60:
        raise ValueError(f"tensor {name[:80]!a} has an odd shape")
    if math.prod(shape) * _BITS[dtype] % 8:
        raise ValueError(f"tensor {name[:80]!a} does not end with a byte")
    return StoredTensor(sys.intern(dtype), tuple(shape), begin)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _told(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
