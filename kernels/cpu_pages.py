"""Memory in large pages, for what is read once a step from end to end: fewer look-ups of addresses on the way."""

from __future__ import annotations

import mmap

import torch

_CHUNK = 32 << 20
_current: list[tuple[torch.Tensor, int]] = []


def zeros(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns] of zeros on a line of 64 bytes; tensors share chunks of memory, which live as long as they do."""
    size = rows * columns * dtype.itemsize
    chunk, used = _current.pop() if _current else (_chunk(_CHUNK), 0)
    if used + size > chunk.numel():
        chunk, used = _chunk(max(size, _CHUNK)), 0
    _current.append((chunk, used + -(-size // 64) * 64))
    return chunk[used : used + size].view(dtype).view(rows, columns)


def _chunk(size: int) -> torch.Tensor:
    """Anonymous memory, all zeros, in pages of 2 MiB where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
