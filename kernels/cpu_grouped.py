"""The LoRA linear on CPU: tiles of tokens that share a cluster go through V, Σ and U without leaving the cache.

Two steps, as in flashinfer: :meth:`TokenGroups.plan` looks once at who is in the batch; :class:`PackedLinear` runs
for every layer on that plan. One call for a layer, whatever its slices; no buffer of the batch's size; rows of the
base model are not looked at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from vllm_jdlora.kernels import cpu_threads
from vllm_jdlora.kernels.cpu_tiles import BLOCK, TOKENS, Form, expand_tile, lay_u, lay_v, shrink_tile, sigma_tile

_MOST = TOKENS[-1]
# Rows of V are padded to the sums of one token's tile, which is a vector at most.
_ROWS = 16
_LINE = 64

# Fields of a layer's parameters and of a plan's, int64 each.
(
    _X, _X_STRIDE, _Y, _Y_STRIDE, _PLAN, _SCRATCH, _SCRATCH_STRIDE,
    _V, _V_BLOCK, _V_CLUSTER, _ROWS_OF_V, _D_IN, _TURNS,
    _SIGMA, _SIGMA_SLOT, _DIAGONAL, _RANK, _SLICES, _SLICE_TABLE,
) = range(19)  # fmt: skip
_FIELDS = 19
(_TOKENS, _SLOTS, _TILE_START, _TILE_COUNT, _TILE_CLUSTER, _SPLIT) = range(6)
# For each slice: address of its U, bytes from cluster to cluster, from block to block, d_out.
_PER_SLICE = 4


@dataclass
class TokenGroups:
    """The tokens of a step in tiles: up to four that share a cluster; tokens without an adapter are left out.

    Attributes:
        num_tokens: rows of x and y that the plan is for.
        tokens, slots: int64 [L], the rows sorted by cluster and then by scaling slot, and each one's slot.
        tile_start, tile_count, tile_cluster: int64 [tiles]; a tile is ``tokens[start : start + count]``.
        split: int64 [threads + 1]; thread i has the tiles ``split[i] : split[i + 1]``.
        empty: whether no token has an adapter.
        address: of the addresses that the kernel reads; valid while this plan lives.
    """

    num_tokens: int
    tokens: np.ndarray
    slots: np.ndarray
    tile_start: np.ndarray
    tile_count: np.ndarray
    tile_cluster: np.ndarray
    split: np.ndarray
    empty: bool = field(init=False)
    threads: int = field(init=False)
    address: int = field(init=False, repr=False)
    _addresses: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = (self.tokens, self.slots, self.tile_start, self.tile_count, self.tile_cluster, self.split)
        # Read once here and not by every layer.
        self._addresses = np.array([part.ctypes.data for part in parts], dtype=np.int64)
        self.address = self._addresses.ctypes.data
        self.empty, self.threads = not len(self.tokens), len(self.split) - 1

    @classmethod
    def plan(cls, token_cluster: np.ndarray, token_slot: np.ndarray, threads: int | None = None) -> TokenGroups:
        """Plan for tokens with these clusters and scaling slots (integer arrays [T]; −1 means no adapter)."""
        threads = cpu_threads.count() if threads is None else threads
        live = np.flatnonzero((token_cluster >= 0) & (token_slot >= 0))
        # Clusters and slots are far below 2³¹: one key sorts by both.
        key = token_cluster[live].astype(np.int64) << 32 | token_slot[live]
        order = np.argsort(key, kind="stable")
        tokens = live[order]
        cluster = token_cluster[tokens].astype(np.int64)
        changes = np.flatnonzero(cluster[1:] != cluster[:-1]) + 1
        starts = np.concatenate(([0], changes)) if len(tokens) else changes
        lengths = np.diff(np.append(starts, len(tokens)))
        tiles = -(-lengths // _MOST)
        first = np.cumsum(tiles) - tiles
        within = np.arange(int(tiles.sum())) - np.repeat(first, tiles)
        tile_start = np.repeat(starts, tiles) + _MOST * within
        tile_count = np.minimum(_MOST, np.repeat(starts + lengths, tiles) - tile_start)
        return cls(
            num_tokens=len(token_cluster),
            tokens=tokens.astype(np.int64),
            slots=token_slot[tokens].astype(np.int64),
            tile_start=tile_start.astype(np.int64),
            tile_count=tile_count.astype(np.int64),
            tile_cluster=np.repeat(cluster[starts], tiles),
            split=_split(tile_count, threads),
        )


def _split(tile_count: np.ndarray, threads: int) -> np.ndarray:
    """Tiles for each thread, alike in work: reading a cluster's bases costs about as much as one token."""
    if not len(tile_count):
        return np.zeros(2, dtype=np.int64)
    work = np.cumsum(np.array([0, 2, 3, 5, 5])[tile_count])
    threads = min(threads, len(tile_count))
    inner = np.searchsorted(work, work[-1] * np.arange(1, threads) / threads, side="left") + 1
    return np.concatenate(([0], inner, [len(tile_count)])).astype(np.int64)


class PackedLinear:
    """The bases of one linear module (its slices packed: q, k, v) as the kernel reads them.

    The slices' V of a cluster lie one below the other: q, k and v see the same x.

    Attributes:
        form: of the bases.
        sigma: fp32 [slots, slices, R, R] or, for JD-Diag, [slots, slices, R]; read where it is.
    """

    def __init__(self, widths: Sequence[int], d_in: int, rank: int, clusters: int, form: Form, sigma: torch.Tensor):
        """Room for C clusters of bases of rank R, a multiple of 8. widths: d_out of each slice."""
        if rank % 8:
            raise ValueError(f"the CPU kernel takes ranks that are multiples of 8, not {rank}: pad with zeros")
        if sigma.dtype != torch.float32 or not sigma[0].is_contiguous():
            raise ValueError("the CPU kernel reads Σ in fp32, each slot contiguous")
        self.form, self.rank, self.widths, self.sigma = form, rank, tuple(widths), sigma
        rows = -(-len(widths) * rank // _ROWS) * _ROWS
        self._d_in, self._rows = d_in, rows
        turns, each = -(-d_in // form.step), 2 if form.pairs else 1
        self._v = torch.zeros(clusters, rows // BLOCK, turns, BLOCK, form.step, dtype=form.stored)
        self._u = [
            torch.zeros(clusters, -(-width // form.lanes), rank // each, form.lanes, each, dtype=form.stored)
            for width in widths
        ]
        self._parameters = np.zeros(_FIELDS, dtype=np.int64)
        self._slices = np.array(
            [
                (u.data_ptr(), u.stride(0) * u.element_size(), u.stride(1) * u.element_size(), width)
                for u, width in zip(self._u, widths, strict=True)
            ],
            dtype=np.int64,
        )
        self._fill_in()
        self._data = self._parameters.ctypes.data
        self._run = _kernel(form, form.lanes if rank % form.lanes == 0 else 8)
        self._take_scratch(cpu_threads.count())

    def write(self, cluster: int, u: Sequence[torch.Tensor], v: Sequence[torch.Tensor]) -> None:
        """Lay one cluster's bases down: for each slice U [d_out, R] and V [R, d_in]."""
        lay_v(self.form, torch.cat([part.to(self.form.stored) for part in v]), self._v[cluster])
        for laid, part in zip(self._u, u, strict=True):
            lay_u(self.form, part, laid[cluster])

    def add_(self, y: torch.Tensor, x: torch.Tensor, groups: TokenGroups) -> None:
        """``y[t] += U[c(t)] · (Σ[s(t)] · (V[c(t)] · x[t]))`` in place (meaning: ``reference.jd_linear``).

        y: [T, sum of d_out over slices], x: [T, d_in], both of the form's dtype with contiguous rows. Rows without an
        adapter are not touched. Sums are fp32, y is rounded once.
        """
        if groups.empty:
            return
        stored = self.form.stored
        if y.dtype != stored or x.dtype != stored:
            raise ValueError(f"x and y must be {stored}, as the bases are, not {x.dtype} and {y.dtype}")
        threads = groups.threads
        if threads > self._threads:
            self._take_scratch(threads)
        self._run(self._data, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), groups.address, threads)

    def _take_scratch(self, threads: int) -> None:
        self._parameters[_SCRATCH] = _scratch(self._scratch_bytes * threads)
        self._threads = threads

    def _fill_in(self) -> None:
        v, sigma, fields = self._v, self.sigma, self._parameters
        width = v.element_size()
        turns = v.shape[2]
        # Addresses of rows (x, y), x in the form that shrink takes, h, g, and a row of y for tokens that are not there.
        x_bytes = turns * self.form.step * (2 if self.form.pairs else 4)
        parts = (16 * _MOST, _MOST * x_bytes, _MOST * self._rows * 4, _MOST * self._rows * 4, sum(self.widths) * width)
        self._scratch_bytes = sum(-(-part // _LINE) * _LINE for part in parts)
        fields[_SCRATCH_STRIDE] = self._scratch_bytes
        fields[_V], fields[_V_BLOCK], fields[_V_CLUSTER] = v.data_ptr(), v.stride(1) * width, v.stride(0) * width
        fields[_ROWS_OF_V], fields[_D_IN], fields[_TURNS] = self._rows, self._d_in, turns
        fields[_SIGMA], fields[_SIGMA_SLOT] = sigma.data_ptr(), sigma.stride(0) * 4
        fields[_DIAGONAL], fields[_RANK], fields[_SLICES] = sigma.ndim == 3, self.rank, len(self.widths)
        fields[_SLICE_TABLE] = self._slices.ctypes.data


_held: list[torch.Tensor] = []


def _scratch(size: int) -> int:
    """Address of so many bytes, which layers share; they run one after the other. Never freed: few sizes occur."""
    if not _held or _held[-1].numel() < size + _LINE:
        _held.append(torch.empty(size + _LINE, dtype=torch.uint8))
    return -(-_held[-1].data_ptr() // _LINE) * _LINE


@lru_cache
def _kernel(form: Form, few: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """The compiled call: parameters' address, x and its stride (in numbers), y and its stride, plan, threads.

    few: rows of Σ that are taken at once, a divisor of the rank. Compiling takes about two seconds.
    """
    import numba

    from vllm_jdlora.kernels.cpu_numbers import address_as_pointer, narrowed, widened

    carray, int64, float32 = numba.carray, np.int64, np.float32
    shrink1, shrink2, shrink4 = (shrink_tile(form, tokens) for tokens in TOKENS)
    vectors, lanes = form.vectors, form.lanes
    wide1, wide2, wide4 = (expand_tile(form, tokens, vectors) for tokens in TOKENS)
    slim1, slim2, slim4 = (expand_tile(form, tokens, 1) for tokens in TOKENS)
    apply_sigma, scale = sigma_tile(form, few, False), sigma_tile(form, few, True)
    rows1, rows2, rows4 = (form.rows(tokens) for tokens in TOKENS)
    pairs, half = form.pairs, form.stored == torch.bfloat16
    width = 2 if half else 4
    x_width = 2 if pairs else 4
    step, vector_bytes = form.step, form.vector_bytes
    thread_number, on_all = cpu_threads.thread_number(), cpu_threads.on_all()
    jit = numba.njit(error_model="numpy", fastmath=True, inline="always")

    @jit
    def line(size: int) -> int:
        return (size + 63) // 64 * 64

    @jit
    def row_of_v(v: int, row: int, block: int) -> int:
        return v + row // BLOCK * block + row % BLOCK * vector_bytes

    @jit
    def read(address: int, index: int) -> Any:
        """A number of x, y, U as fp32."""
        if half:
            return widened(carray(address_as_pointer(address), 1 << 30, np.uint16)[index])
        return carray(address_as_pointer(address), 1 << 30, float32)[index]

    @numba.cfunc(numba.types.void(numba.types.voidptr), error_model="numpy", fastmath=True)
    def run(data: Any) -> None:
        p = carray(data, _FIELDS, int64)
        plan = carray(address_as_pointer(p[_PLAN]), 6, int64)
        big = 1 << 40
        tokens = carray(address_as_pointer(plan[_TOKENS]), big, int64)
        slots = carray(address_as_pointer(plan[_SLOTS]), big, int64)
        tile_start = carray(address_as_pointer(plan[_TILE_START]), big, int64)
        tile_count = carray(address_as_pointer(plan[_TILE_COUNT]), big, int64)
        tile_cluster = carray(address_as_pointer(plan[_TILE_CLUSTER]), big, int64)
        split = carray(address_as_pointer(plan[_SPLIT]), big, int64)
        thread = int64(thread_number())
        rows, rank, slices, d_in, turns = p[_ROWS_OF_V], p[_RANK], p[_SLICES], p[_D_IN], p[_TURNS]
        padded = turns * step
        # This thread's scratch.
        at_rows = p[_SCRATCH] + thread * p[_SCRATCH_STRIDE]
        at_x = at_rows + line(16 * 4)
        at_h = at_x + line(4 * padded * x_width)
        at_g = at_h + line(4 * rows * 4)
        at_y = at_g + line(4 * rows * 4)
        x_rows = carray(address_as_pointer(at_rows), 4, int64)
        y_rows = carray(address_as_pointer(at_rows + 32), 4, int64)
        g = carray(address_as_pointer(at_g), (4, rows), float32)
        g_pairs = carray(address_as_pointer(at_g), (4, 2 * rows), np.uint16)
        copied = (not pairs and half) or padded != d_in
        g_stride = rows * 4

        for tile in range(split[thread], split[thread + 1]):
            start, count = tile_start[tile], tile_count[tile]
            size = 1 if count == 1 else (2 if count == 2 else 4)
            for i in range(size):
                token = tokens[start + min(i, count - 1)]
                x_rows[i] = p[_X] + token * p[_X_STRIDE]
                y_rows[i] = p[_Y] + token * p[_Y_STRIDE] if i < count else at_y
            if copied:
                for i in range(size):
                    if pairs:
                        narrow_x = carray(address_as_pointer(x_rows[i]), d_in, np.uint16)
                        own = carray(address_as_pointer(at_x + i * padded * 2), padded, np.uint16)
                        for d in range(d_in):
                            own[d] = narrow_x[d]
                        for d in range(d_in, padded):
                            own[d] = 0
                    else:
                        wide = carray(address_as_pointer(at_x + i * padded * 4), padded, float32)
                        for d in range(d_in):
                            wide[d] = read(x_rows[i], d)
                        for d in range(d_in, padded):
                            wide[d] = 0
                    x_rows[i] = at_x + i * padded * x_width

            v = p[_V] + tile_cluster[tile] * p[_V_CLUSTER]
            onward = tile_cluster[min(tile + 1, split[thread + 1] - 1)] - tile_cluster[tile]
            v_ahead = onward * p[_V_CLUSTER]
            if size == 1:
                for j in range(0, rows, rows1):
                    shrink1(at_rows, row_of_v(v, j, p[_V_BLOCK]), p[_V_BLOCK], turns, at_h + j * 4, g_stride, v_ahead)
            elif size == 2:
                for j in range(0, rows, rows2):
                    shrink2(at_rows, row_of_v(v, j, p[_V_BLOCK]), p[_V_BLOCK], turns, at_h + j * 4, g_stride, v_ahead)
            else:
                for j in range(0, rows, rows4):
                    shrink4(at_rows, row_of_v(v, j, p[_V_BLOCK]), p[_V_BLOCK], turns, at_h + j * 4, g_stride, v_ahead)

            g_width = 2 if pairs else 4
            for i in range(count):
                sigma = p[_SIGMA] + slots[start + i] * p[_SIGMA_SLOT]
                of_h, of_g = at_h + i * g_stride, at_g + i * g_stride
                for r in range(0, slices * rank, few):
                    if p[_DIAGONAL]:
                        scale(sigma + 4 * r, 1, of_h + 4 * r, of_g + g_width * r)
                    else:
                        first = r // rank * rank
                        apply_sigma(sigma + 4 * r * rank, rank // few, of_h + 4 * first, of_g + g_width * r)

            table = carray(address_as_pointer(p[_SLICE_TABLE]), (slices, _PER_SLICE), int64)
            column = int64(0)
            depth = rank // 2 if pairs else rank
            for s in range(slices):
                u = table[s, 0] + tile_cluster[tile] * table[s, 1]
                u_block, d_out = table[s, 2], table[s, 3]
                u_ahead = onward * table[s, 1]
                at_g_slice = at_g + s * rank * (2 if pairs else 4)
                o = int64(0)
                while o + vectors * lanes <= d_out:
                    at, to = u + o // lanes * u_block, (column + o) * width
                    if size == 1:
                        wide1(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    elif size == 2:
                        wide2(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    else:
                        wide4(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    o += vectors * lanes
                while o + lanes <= d_out:
                    at, to = u + o // lanes * u_block, (column + o) * width
                    if size == 1:
                        slim1(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    elif size == 2:
                        slim2(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    else:
                        slim4(at_rows + 32, to, at, u_block, at_g_slice, g_stride, depth, u_ahead)
                    o += lanes
                last = u + o // lanes * u_block
                while o < d_out:
                    lane = o % lanes
                    for i in range(count):
                        total = read(y_rows[i], column + o)
                        for r in range(rank):
                            if pairs:
                                basis = read(last + r // 2 * vector_bytes, 2 * lane + r % 2)
                                total += widened(g_pairs[i, s * rank + r]) * basis
                            else:
                                total += g[i, s * rank + r] * read(last + r * vector_bytes, lane)
                        if half:
                            carray(address_as_pointer(y_rows[i]), 1 << 30, np.uint16)[column + o] = narrowed(total)
                        else:
                            carray(address_as_pointer(y_rows[i]), 1 << 30, float32)[column + o] = total
                    o += 1
                column += d_out

    body = run.address
    entry = numba.types.void(*[numba.types.int64] * 7)

    @numba.cfunc(entry, error_model="numpy")
    def call(data: int, x: int, x_stride: int, y: int, y_stride: int, plan: int, threads: int) -> None:
        p = carray(address_as_pointer(data), _FIELDS, int64)
        p[_X], p[_X_STRIDE], p[_Y], p[_Y_STRIDE], p[_PLAN] = x, x_stride * width, y, y_stride * width, plan
        on_all(address_as_pointer(body), address_as_pointer(data), threads, 0)

    # Holding the interpreter: handing it to another thread and waiting for it again takes longer than the call.
    function = ctypes.PYFUNCTYPE(None, *[ctypes.c_int64] * 7)(call.address)
    function.compiled = (run, call)  # type: ignore[attr-defined]
    return function
