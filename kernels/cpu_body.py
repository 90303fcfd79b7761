"""The body of the CPU kernel, which each thread runs over its groups of tokens: shrink, Σ, expand.

One stream of bases is read, group after group; what comes next is fetched from memory meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch

from vllm_jdlora.kernels import cpu_machine_code, cpu_threads
from vllm_jdlora.kernels.cpu_layout import BLOCK, Form, byte_values
from vllm_jdlora.kernels.cpu_numbers import address_as_pointer, narrowed, widened
from vllm_jdlora.kernels.cpu_tiles import SIGMA_COLUMNS, TOKENS, expand_tile, fetching, shrink_tile, sigma_tile

# Bytes of bases between what is multiplied and what is fetched.
_AHEAD = 8 << 10

# Parameters of a layer, int64 each: addresses, strides in bytes, sizes. AT_…: bytes from a thread's scratch, which
# begins with the addresses of rows of x and of y, to its own x, h and g.
# numba reads module-level numbers as constants; with members of an enumeration it compiled for minutes.
FIELDS = 24
(
    X, X_STRIDE, Y, Y_STRIDE, PLAN, SCRATCH, SCRATCH_STRIDE, AT_X, AT_H, AT_G, BASES, CLUSTER, V_BLOCK,
    ROWS_OF_V, D_IN, TURNS, SIGMA, SIGMA_SLOT, DIAGONAL, PIECES, SLICES, SLICE_TABLE,
    SCALES, BODY,
) = range(FIELDS)  # fmt: skip
# Addresses in a plan.
PLAN_TOKENS, PLAN_SLOTS, PLAN_GROUP_START, PLAN_GROUP_COUNT, PLAN_GROUP_CLUSTER, PLAN_SPLIT = range(6)
# Of each slice: bytes from a cluster's bases to its U, d_out.
_PER_SLICE = 2
GROUP = 16
"""Most tokens that read a piece of the bases one after the other while it is in the nearest cache."""
# Bytes of the addresses of a group's rows.
_ROWS_BYTES = 8 * GROUP


@dataclass(frozen=True)
class Kernel:
    """The compiled kernel.

    Attributes:
        run: a call with the parameters' address, x and its stride (in numbers), y and its stride, plan, threads.
        address: of that function, for other compiled code.
        body: address of what each thread runs, which the parameters hand to it.
    """

    run: Callable[[int, int, int, int, int, int, int], None]
    address: int
    body: int


@lru_cache
def compiling(form: Form, rank: int) -> Future[Kernel]:
    """The compiled kernel, some seconds from now at the first time; rank: R, a multiple of 8.

    A thread compiles: LLVM runs beside the interpreter, so that a server that starts goes on with its other work.
    """
    executor = ThreadPoolExecutor(1, "compile-kernel", cpu_threads.leave_core)
    found = executor.submit(_compiled, form, rank)
    executor.shutdown(wait=False)
    return found


def _compiled(form: Form, rank: int) -> Kernel:
    thread_number, on_all, width = cpu_threads.thread_number(), cpu_threads.on_all(), form.stored.itemsize
    body = cpu_machine_code.compiled("grouped-body", (form, rank), lambda: _body(form, rank, thread_number))
    entry = cpu_machine_code.compiled("grouped", width, lambda: _entry(width, on_all))
    # Holding the interpreter: handing it to another thread and waiting for it again takes longer than the call.
    return Kernel(ctypes.PYFUNCTYPE(None, *[ctypes.c_int64] * 7)(entry), entry, body)


def _body(form: Form, rank: int, thread_number: Any) -> Any:
    few = form.lanes if rank % form.lanes == 0 else 8  # rows of Σ that are taken at once
    depth = rank // 2 if form.pairs else rank
    carray, int64, float32 = numba.carray, np.int64, np.float32
    shrink1, shrink2, shrink3, shrink4 = (shrink_tile(form, tokens, form.rows(tokens)) for tokens in TOKENS)
    shrink1_of_8, again4 = shrink_tile(form, 1, 8), shrink_tile(form, 4, form.rows(4), fetches=False)
    vectors, lanes, u_block = form.vectors, form.lanes, depth * form.vector_bytes
    wide1, wide2, wide3, wide4 = (expand_tile(form, tokens, vectors, depth) for tokens in TOKENS)
    wide_again4 = expand_tile(form, 4, vectors, depth, fetches=False)
    slim1, slim2, slim3, slim4 = (expand_tile(form, tokens, 1, depth) for tokens in TOKENS)
    apply_sigma, scale = sigma_tile(form, few, False), sigma_tile(form, few, True)
    fetch = fetching()
    rows1, rows2, rows4 = form.rows(1), form.rows(2), form.rows(4)
    pairs, half = form.pairs, form.stored == torch.bfloat16
    width = form.stored.itemsize
    x_width = g_width = 2 if pairs else 4
    step, vector_bytes = form.step, form.vector_bytes
    eight_bit, looked_up = form.eight_bit is not None, form.looked_up
    values = byte_values(form) if eight_bit else np.zeros(1, np.float32)

    @numba.njit(error_model="numpy", fastmath=True, inline="always")
    def read(address: int, index: int) -> Any:
        """A number of x, y, U as fp32."""
        if half:
            return widened(carray(address_as_pointer(address), 1 << 30, np.uint16)[index])
        return carray(address_as_pointer(address), 1 << 30, float32)[index]

    @numba.njit(error_model="numpy", fastmath=True, inline="always")
    def number(block: int, vector: int, index: int) -> Any:
        """A number of a block of U as fp32."""
        if looked_up:
            place = block + vector // 2 * 2 * vector_bytes + index // 8 * 16 + vector % 2 * 8 + index % 8
            return values[carray(address_as_pointer(place), 1, np.uint8)[0]]
        if eight_bit:
            return values[carray(address_as_pointer(block + vector * vector_bytes), 1 << 30, np.uint8)[index]]
        return read(block + vector * vector_bytes, index)

    @numba.cfunc(numba.types.void(numba.types.voidptr), error_model="numpy", fastmath=True)
    def run(data: Any) -> None:
        p = carray(data, FIELDS, int64)
        plan = carray(address_as_pointer(p[PLAN]), 6, int64)
        big = 1 << 40
        tokens = carray(address_as_pointer(plan[PLAN_TOKENS]), big, int64)
        slots = carray(address_as_pointer(plan[PLAN_SLOTS]), big, int64)
        group_start = carray(address_as_pointer(plan[PLAN_GROUP_START]), big, int64)
        group_count = carray(address_as_pointer(plan[PLAN_GROUP_COUNT]), big, int64)
        group_cluster = carray(address_as_pointer(plan[PLAN_GROUP_CLUSTER]), big, int64)
        split = carray(address_as_pointer(plan[PLAN_SPLIT]), big, int64)
        thread = int64(thread_number())
        rows, slices, d_in, turns, pieces = p[ROWS_OF_V], p[SLICES], p[D_IN], p[TURNS], p[PIECES]
        padded = turns * step
        sigma_lines = max(slices * rank * (1 if p[DIAGONAL] else rank) * width // 64, 1)
        # This thread's scratch.
        at_rows = p[SCRATCH] + thread * p[SCRATCH_STRIDE]
        at_x, at_h, at_g = at_rows + p[AT_X], at_rows + p[AT_H], at_rows + p[AT_G]
        at_y_rows = at_rows + _ROWS_BYTES
        x_rows = carray(address_as_pointer(at_rows), GROUP, int64)
        y_rows = carray(address_as_pointer(at_y_rows), GROUP, int64)
        h = carray(address_as_pointer(at_h), (GROUP, rows), float32)
        g = carray(address_as_pointer(at_g), (GROUP, rows), float32)
        g_pairs = carray(address_as_pointer(at_g), (GROUP, 2 * rows), np.uint16)
        copied = (not pairs and half) or padded != d_in
        g_stride = rows * 4

        for group in range(split[thread], split[thread + 1]):
            start, count = group_start[group], group_count[group]
            # What does not fill tiles of four comes first.
            size = (count - 1) % 4 + 1
            for i in range(count):
                token = tokens[start + i]
                x_rows[i] = p[X] + token * p[X_STRIDE]
                y_rows[i] = p[Y] + token * p[Y_STRIDE]
            if copied:
                for i in range(count):
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
                if i == 0 or slots[start + i] != slots[start + i - 1]:
                    fetch(p[SIGMA] + slots[start + i] * p[SIGMA_SLOT], sigma_lines)

            # Of V's rows, then of U's columns.
            scales = p[SCALES] + group_cluster[group] * rows * 8
            v_scale = carray(address_as_pointer(scales), rows, float32)
            if eight_bit:
                fetch(scales, rows * 8 // 64)

            bases = p[BASES] + group_cluster[group] * p[CLUSTER]
            # What the next group reads lies behind what this one reads.
            onward = (group_cluster[min(group + 1, split[thread + 1] - 1)] - group_cluster[group] - 1) * p[CLUSTER]
            within = p[CLUSTER] - _AHEAD
            # The rows of V that the first tile reads once, in which as many reads of fewer rows fit.
            most = rows1 if size == 1 else (rows2 if size == 2 else rows4)
            j = int64(0)
            while j < rows:
                # There are rows for half a vector of sums at the end where one token's tile takes a whole one.
                piece = most if j + most <= rows else int64(8)
                offset = j // BLOCK * p[V_BLOCK] + j % BLOCK * vector_bytes
                ahead = _AHEAD if offset < within else _AHEAD + onward
                if piece == 8 and size == 1:
                    shrink1_of_8(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
                elif size == 1:
                    shrink1(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
                elif size == 2:
                    shrink2(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
                elif size == 3:
                    shrink3(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
                else:
                    shrink4(at_rows, bases + offset, p[V_BLOCK], turns, at_h + j * 4, g_stride, ahead)
                for i in range(size, count, 4):
                    for k in range(j, j + piece, rows4):
                        offset = k // BLOCK * p[V_BLOCK] + k % BLOCK * vector_bytes
                        to = at_h + i * g_stride + k * 4
                        again4(at_rows + 8 * i, bases + offset, p[V_BLOCK], turns, to, g_stride, 0)
                j += piece

            for i in range(count):
                sigma = p[SIGMA] + slots[start + i] * p[SIGMA_SLOT]
                of_h, of_g = at_h + i * g_stride, at_g + i * g_stride
                if eight_bit:
                    for r in range(rows):
                        h[i, r] *= v_scale[r]
                for r in range(0, slices * rank, few):
                    if p[DIAGONAL]:
                        scale(sigma + width * r, 0, 1, of_h + 4 * r, of_g + g_width * r, scales + 4 * (rows + r))
                    else:
                        first = r // rank * rank
                        of_sigma = sigma + width * (first * rank + r - first)
                        to, of_u = of_g + g_width * r, scales + 4 * (rows + r)
                        apply_sigma(of_sigma, rank * width, rank // SIGMA_COLUMNS, of_h + 4 * first, to, of_u)

            table = carray(address_as_pointer(p[SLICE_TABLE]), (slices, _PER_SLICE), int64)
            column = int64(0)
            for s in range(slices):
                u, d_out = table[s, 0], table[s, 1]
                of_g = at_g + s * rank * g_width
                o = int64(0)
                while o + vectors * lanes <= d_out:
                    offset, to = u + o // lanes * u_block, (column + o) * width
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    if size == 1:
                        wide1(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    elif size == 2:
                        wide2(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    elif size == 3:
                        wide3(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    else:
                        wide4(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    for i in range(size, count, 4):
                        more_y, more_g = at_y_rows + 8 * i, of_g + i * g_stride
                        wide_again4(more_y, to, bases + offset, more_g, g_stride, pieces, 0)
                    o += vectors * lanes
                while o + lanes <= d_out:
                    offset, to = u + o // lanes * u_block, (column + o) * width
                    ahead = _AHEAD if offset < within else _AHEAD + onward
                    if size == 1:
                        slim1(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    elif size == 2:
                        slim2(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    elif size == 3:
                        slim3(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    else:
                        slim4(at_y_rows, to, bases + offset, of_g, g_stride, pieces, ahead)
                    for i in range(size, count, 4):
                        more_y, more_g = at_y_rows + 8 * i, of_g + i * g_stride
                        slim4(more_y, to, bases + offset, more_g, g_stride, pieces, ahead)
                    o += lanes
                last = bases + u + o // lanes * u_block
                while o < d_out:
                    lane = o % lanes
                    for i in range(count):
                        total = read(y_rows[i], column + o)
                        for r in range(rank):
                            if pairs:
                                basis = number(last, r // 2, 2 * lane + r % 2)
                                total += widened(g_pairs[i, s * rank + r]) * basis
                            else:
                                total += g[i, s * rank + r] * number(last, r, lane)
                        if half:
                            carray(address_as_pointer(y_rows[i]), 1 << 30, np.uint16)[column + o] = narrowed(total)
                        else:
                            carray(address_as_pointer(y_rows[i]), 1 << 30, float32)[column + o] = total
                    o += 1
                column += d_out

    return run


def _entry(width: int, on_all: Any) -> Any:
    """width: bytes of a number of x and y."""
    carray, int64 = numba.carray, np.int64

    @numba.cfunc(numba.types.void(*[numba.types.int64] * 7), error_model="numpy")
    def call(data: int, x: int, x_stride: int, y: int, y_stride: int, plan: int, threads: int) -> None:
        p = carray(address_as_pointer(data), FIELDS, int64)
        p[X], p[X_STRIDE], p[Y], p[Y_STRIDE], p[PLAN] = x, x_stride * width, y, y_stride * width, plan
        on_all(address_as_pointer(p[BODY]), address_as_pointer(data), threads, 0)

    return call
