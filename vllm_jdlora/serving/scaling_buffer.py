"""The Σ of resident adapters on the device, each one row of a buffer, written whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels import cpu_pages
from vllm_jdlora.serving.module_slices import ModuleSlices

STAGING_BYTES = 64 << 20
"""Pinned host memory for rows on their way to a GPU: enough for every miss of a step, so that none waits for one."""
MOST_STAGED = 256


class ScalingBuffer:
    """Rows of Σ in the device's dtype and the model's order of slices.

    Attributes:
        slots: S.
        sigma: [S + 1, rows, R, R], or [S + 1, rows, R] of diagonals: row s is the Σ of the adapter in slot s for every
            module slice, row S is the identity, through which plain adapters of any rank up to R pass unchanged. In
            memory Σ lie row by row or, where the kernel multiplies so, column by column.
    """

    def __init__(
        self,
        slots: int,
        rows: int,
        rank: int,
        *,
        diagonal: bool,
        dtype: torch.dtype,
        device: torch.device | str,
        by_columns: bool = False,
    ):
        """
        Args:
            slots: S.
            rows: module slices.
            rank: R, the width of vLLM's LoRA buffers.
            diagonal: JD-Diag.
            dtype: of the buffer.
            device: of the buffer. Rows go to a GPU by way of pinned host memory.
            by_columns: Σ lie column by column in memory.
        """
        identity = torch.ones(rank) if diagonal else torch.eye(rank)
        shape = (slots + 1, rows, *identity.shape)
        if torch.device(device).type == "cpu":
            # Takes no room before it is written, so slots cost what is used of them.
            self.sigma = cpu_pages.zeros(slots + 1, math.prod(shape[1:]), dtype).view(shape)
        else:
            self.sigma = torch.zeros(shape, dtype=dtype, device=device)
        if by_columns and not diagonal:
            self.sigma = self.sigma.mT
        self.sigma[slots] = identity.to(self.sigma)
        self.slots, self._rank = slots, rank
        self._order = self._covered = torch.empty(0, dtype=torch.int64)
        self._laid_out = False
        self._whole = False  # every number of a row comes from the collection
        self._staging: StagingRows | None = None
        if self.sigma.is_cuda:
            count = max(2, min(MOST_STAGED, STAGING_BYTES // self.row_bytes))
            rows_on_host = torch.zeros((count, *self.sigma.shape[1:]), dtype=dtype, pin_memory=True)
            self._staging = StagingRows(rows_on_host, torch.cuda.Event)

    @property
    def identity_slot(self) -> int:
        return self.slots

    @property
    def row_bytes(self) -> int:
        return self.sigma[0].numel() * self.sigma.element_size()

    def lay_out(self, slices: ModuleSlices, rank: int) -> None:
        """Take Σ of this layout from now on; every slot but the identity becomes zero.

        Args:
            slices: which row each slice of the collection has.
            rank: of the collection, at most R.
        """
        if self._laid_out:  # fresh memory is zero
            self.sigma[: self.slots] = 0
        self._laid_out = True
        if self._staging is not None:
            self._staging.clear()
        self._order, self._covered, self._rank = slices.order, slices.covered, rank
        rows, width = self.sigma.shape[1:3]
        self._whole = rank == width and torch.equal(slices.covered, torch.arange(rows))

    def is_laid_out(self, slices: ModuleSlices, rank: int) -> bool:
        """Whether Σ of this layout can be written beside those that are there."""
        same = torch.equal(slices.order, self._order) and torch.equal(slices.covered, self._covered)
        return same and rank == self._rank

    def write(self, slot: int, stored: torch.Tensor, name: str) -> None:
        """Copy one adapter's Σ into a slot.

        Args:
            slot: whose row is written whole: what the collection does not cover stays zero.
            stored: [slices, r, r] or [slices, r] in the collection's order, on the host.
            name: of the adapter, for messages.

        Raises:
            JDLoRAError: a value that is not finite, or another shape; the slot is as before.
        """
        matrix = stored.shape[1:]
        if matrix != (self._rank,) * (self.sigma.ndim - 2):
            raise JDLoRAError(
                f"the scalings of adapter {name!r} are {list(matrix)}, the collection's rank {self._rank}"
            )
        # A file may be damaged after a server has started; a NaN would spread to all that the request writes. One sum
        # tells of any (46 KB of bf16: 7 us, where a look at each value takes 55), and a look settles what overflows.
        if not bool(stored.sum(dtype=torch.float32).isfinite()) and not bool(torch.isfinite(stored).all()):
            raise JDLoRAError(
                f"the scalings of adapter {name!r} hold NaN or infinity: its file was damaged after it was written; "
                "`jdlora validate` tells which, compress the adapters again"
            )
        if self._staging is None:
            self._fill(self.sigma[slot], stored)
        else:
            self._staging.send(lambda row: self._fill(row, stored), self.sigma[slot])

    def _fill(self, row: torch.Tensor, stored: torch.Tensor) -> None:
        if self._whole:
            torch.index_select(stored.to(row.dtype), 0, self._order, out=row)
            return
        corner = row[:, : self._rank] if row.ndim == 2 else row[:, : self._rank, : self._rank]
        corner.index_copy_(0, self._covered, stored[self._order].to(row.dtype))


class StagingRows:
    """A ring of rows on the host; a row is filled again only when its copy to the device is done."""

    def __init__(self, rows: torch.Tensor, event: Callable[[], Any]):
        """
        Args:
            rows: [count, ...], pinned.
            event: makes an event of the device's current stream (``torch.cuda.Event``).
        """
        self._rows = rows
        self._event = event
        self._copied: list[Any] = [None] * len(rows)
        self._next = 0

    def send(self, fill: Callable[[torch.Tensor], None], target: torch.Tensor) -> None:
        """Let ``fill`` write a row and copy it whole to ``target``, which kernels queued later will see."""
        place = self._next
        self._next = (place + 1) % len(self._rows)
        self._wait_for(place)
        fill(self._rows[place])
        target.copy_(self._rows[place], non_blocking=True)
        self._copied[place] = self._event()
        self._copied[place].record()

    def clear(self) -> None:
        """Every row becomes zero."""
        for place in range(len(self._rows)):
            self._wait_for(place)
        self._rows.zero_()

    def _wait_for(self, place: int) -> None:
        if self._copied[place] is not None:
            self._copied[place].synchronize()
            self._copied[place] = None
