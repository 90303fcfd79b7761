"""The body of the CPU kernel, which each thread runs over its tiles: shrink, Σ, expand.

One stream of bases is read, tile after tile; what comes next is fetched from memory meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

from vllm_jdlora.kernels import cpu_threads
from vllm_jdlora.kernels.cpu_numbers import address_as_pointer, narrowed, widened
from vllm_jdlora.kernels.cpu_tiles import BLOCK, TOKENS, Form, expand_tile, fetching, shrink_tile, sigma_tile

# Bytes of bases between what is multiplied and what is fetched.
_AHEAD = 8 << 10

# Parameters of a layer, int64 each: addresses, strides in bytes, sizes. AT_…: bytes from a thread's scratch, which
# begins with the addresses of rows of x and of y, to its own x, h, g and a row of y for tokens that are not there.
# numba reads module-level numbers as constants; with members of an enumeration it compiled for minutes.
FIELDS = 23
(
    X, X_STRIDE, Y, Y_STRIDE, PLAN, SCRATCH, SCRATCH_STRIDE, AT_X, AT_H, AT_G, AT_Y, BASES, CLUSTER, V_BLOCK,
    ROWS_OF_V, D_IN, TURNS, SIGMA, SIGMA_SLOT, DIAGONAL, RANK, SLICES, SLICE_TABLE,
) = range(FIELDS)  # fmt: skip
# Addresses in a plan.
PLAN_TOKENS, PLAN_SLOTS, PLAN_TILE_START, PLAN_TILE_COUNT, PLAN_TILE_CLUSTER, PLAN_SPLIT = range(6)
# Of each slice: bytes from a cluster's bases to its U, from block to block, d_out.
_PER_SLICE = 3
# Bytes of the addresses of a tile's rows.
_ROWS_BYTES = 8 * TOKENS[-1]


@lru_cache
def compiled(form: Form, few: int) -> Callable[[int, int, int, int, int, int, int], None]:
    """The compiled call: parameters' address, x and its stride (in numbers), y and its stride, plan, threads.

    few: rows of Σ that are taken at once, a divisor of the rank. Compiling takes about two seconds.
    """
    carray, int64, float32 = numba.carray, np.int64, np.float32
    shrink1, shrink2, shrink4 = (shrink_tile(form, tokens) for tokens in TOKENS)
    vectors, lanes = form.vectors, form.lanes
    wide1, wide2, wide4 = (expand_tile(form, tokens, vectors) for tokens in TOKENS)
    slim1, slim2, slim4 = (expand_tile(form, tokens, 1) for tokens in TOKENS)
    apply_sigma, scale = sigma_tile(form, few, False), sigma_tile(form, few, True)
    fetch = fetching()
    rows1, rows2, rows4 = (form.rows(tokens) for tokens in TOKENS)
    pairs, half = form.pairs, form.stored == torch.bfloat16
    width = form.stored.itemsize
    x_width = g_width = 2 if pairs else 4
    step, vector_bytes = form.step, form.vector_bytes
    thread_number, on_all = cpu_threads.thread_number(), cpu_threads.on_all()

    @numba.njit(error_model="numpy", fastmath=True, inline="always")
    def read(address: int, index: int) -> Any:
        """A number of x, y, U as fp32."""
        if half:
            return widened(carray(address_as_pointer(address), 1 << 30, np.uint16)[index])
        return carray(address_as_pointer(address), 1 << 30, float32)[index]

    @numba.cfunc(numba.types.void(numba.types.voidptr), error_model="numpy", fastmath=True)
    def run(data: Any) -> None:
        p = carray(data, FIELDS, int64)
        plan = carray(address_as_pointer(p[PLAN]), 6, int64)
        big = 1 << 40
        tokens = carray(address_as_pointer(plan[PLAN_TOKENS]), big, int64)
        slots = carray(address_as_pointer(plan[PLAN_SLOTS]), big, int64)
        tile_start = carray(address_as_pointer(plan[PLAN_TILE_START]), big, int64)
        tile_count = carray(address_as_pointer(plan[PLAN_TILE_COUNT]), big, int64)
        tile_cluster = carray(address_as_pointer(plan[PLAN_TILE_CLUSTER]), big, int64)
        split = carray(address_as_pointer(plan[PLAN_SPLIT]), big, int64)
        thread = int64(thread_number())
        rows, rank, slices, d_in, turns = p[ROWS_OF_V], p[RANK], p[SLICES], p[D_IN], p[TURNS]
        padded = turns * step
        sigma_lines = max(slices * rank * (1 if p[DIAGONAL] else rank) * 4 // 64, 1)
        # This thread's scratch.
        at_rows = p[SCRATCH] + thread * p[SCRATCH_STRIDE]
        at_x, at_h, at_g, at_y = at_rows + p[AT_X], at_rows + p[AT_H], at_rows + p[AT_G], at_rows + p[AT_Y]
        at_y_rows = at_rows + _ROWS_BYTES
        x_rows = carray(address_as_pointer(at_rows), 4, int64)
        y_rows = carray(address_as_pointer(at_y_rows), 4, int64)
        g = carray(address_as_pointer(at_g), (4, rows), float32)
        g_pairs = carray(address_as_pointer(at_g), (4, 2 * rows), np.uint16)
        copied = (not pairs and half) or padded != d_in
        g_stride = rows * 4

        for tile in range(split[thread], split[thread + 1]):
            start, count = tile_start[tile], tile_count[tile]
            size = 1 if count == 1 else (2 if count == 2 else 4)
            for i in range(size):
                token = tokens[start + min(i, count - 1)]
                x_rows[i] = p[X] + token * p[X_STRIDE]
                y_rows[i] = p[Y] + token * p[Y_STRIDE] if i < count else at_y
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

            # Each token's Σ lies somewhere else: without this every one is waited for.
            for i in range(count):
                fetch(p[SIGMA] + slots[start + i] * p[SIGMA_SLOT], sigma_lines)

            bases = p[BASES] + tile_cluster[tile] * p[CLUSTER]
            # What the next tile reads lies behind what this one reads.
            onward = (tile_cluster[min(tile + 1, split[thread + 1] - 1)] - tile_cluster[tile] - 1) * p[CLUSTER]
            within = p[CLUSTER] - _AHEAD
            # Three copies here and below: one loop that picks the tile inside takes 1 to 2 % longer (bases in the
            # cache), and inlined helpers take a third longer to compile, for which a server waits when it starts.
            if size == 1:
                for j in range(0, rows, rows1):
                    offset = j // BLOCK * p[V_BLOCK] + j % BLOCK * vector_bytes
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    shrink1(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
            elif size == 2:
                for j in range(0, rows, rows2):
                    offset = j // BLOCK * p[V_BLOCK] + j % BLOCK * vector_bytes
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    shrink2(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
            else:
                for j in range(0, rows, rows4):
                    offset = j // BLOCK * p[V_BLOCK] + j % BLOCK * vector_bytes
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    shrink4(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)

            for i in range(count):
                sigma = p[SIGMA] + slots[start + i] * p[SIGMA_SLOT]
                of_h, of_g = at_h + i * g_stride, at_g + i * g_stride
                for r in range(0, slices * rank, few):
                    if p[DIAGONAL]:
                        scale(sigma + 4 * r, 1, of_h + 4 * r, of_g + g_width * r)
                    else:
                        first = r // rank * rank
                        apply_sigma(sigma + 4 * r * rank, rank // few, of_h + 4 * first, of_g + g_width * r)

            table = carray(address_as_pointer(p[SLICE_TABLE]), (slices, _PER_SLICE), int64)
            column = int64(0)
            depth = rank // 2 if pairs else rank
            for s in range(slices):
                u, u_block, d_out = table[s, 0], table[s, 1], table[s, 2]
                of_g = at_g + s * rank * g_width
                o = int64(0)
                while o + vectors * lanes <= d_out:
                    offset, to = u + o // lanes * u_block, (column + o) * width
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    if size == 1:
                        wide1(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    elif size == 2:
                        wide2(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    else:
                        wide4(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    o += vectors * lanes
                while o + lanes <= d_out:
                    offset, to = u + o // lanes * u_block, (column + o) * width
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    if size == 1:
                        slim1(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    elif size == 2:
                        slim2(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    else:
                        slim4(at_y_rows, to, bases + offset, u_block, of_g, g_stride, depth, ahead)
                    o += lanes
                last = bases + u + o // lanes * u_block
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
        p = carray(address_as_pointer(data), FIELDS, int64)
        p[X], p[X_STRIDE], p[Y], p[Y_STRIDE], p[PLAN] = x, x_stride * width, y, y_stride * width, plan
        on_all(address_as_pointer(body), address_as_pointer(data), threads, 0)

    # Holding the interpreter: handing it to another thread and waiting for it again takes longer than the call.
    function = ctypes.PYFUNCTYPE(None, *[ctypes.c_int64] * 7)(call.address)
    function.compiled = (run, call)  # type: ignore[attr-defined]
    return function
