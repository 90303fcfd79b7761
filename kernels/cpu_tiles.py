"""The inner loops of the CPU kernel: tiles of tokens × rows kept in vector registers, as LLVM code for this machine.

numba compiles them when a server starts, so that no compiler is needed. They are written as vector code, and not as
loops for a compiler to vectorise, since the products of bf16 pairs that newer processors have (AVX-512 BF16: twice
the rate of fp32) cannot be said in a loop. Memory is given by addresses; the caller answers for what lies there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from numba.core import types
from numba.extending import intrinsic

from vllm_jdlora.kernels.cpu_code import Code, generating
from vllm_jdlora.kernels.cpu_layout import BLOCK, Form

TOKENS = (1, 2, 3, 4)
"""Tokens of a tile."""
PIECE = 2
"""Vectors of r that a turn of expand takes: for all of them in one LLVM would load too much at a time, and spill."""
SIGMA_COLUMNS = 4
"""Columns of Σ that are taken side by side."""


def shrink_tile(form: Form, tokens: int, rows: int, fetches: bool = True) -> Any:
    """numba intrinsic ``(x_rows, v, v_block, turns, h, h_stride, ahead)``: ``h[t, j] = V[j] · x[t]`` in fp32.

    All int64. x_rows: address of the addresses of ``tokens`` rows, padded to ``turns`` steps (bf16 for pairs, else
    fp32); v: address of ``rows`` rows, up to `form.rows(tokens)`, in the layout of `lay_v`; v_block: bytes from block
    to block.
    ahead: bytes from here to what is read next, of which as much is fetched meanwhile; with ``fetches`` alone.
    """
    lanes = form.lanes

    def body(code: Code, x_rows: Any, v: Any, v_block: Any, turns: Any, h: Any, h_stride: Any, ahead: Any) -> None:
        x_at = [code.load_i64(x_rows, 8 * t) for t in range(tokens)]
        blocks = [code.add(v, code.times(v_block, block)) for block in range(-(-rows // BLOCK))]
        with code.loop(turns, [code.zeros(lanes)] * (tokens * rows)) as (turn, sums):
            xs = [code.load(code.add(a, code.times(turn, lanes * 4)), lanes, form, "x") for a in x_at]
            here = [code.add(a, code.times(turn, BLOCK * form.vector_bytes)) for a in blocks]
            vs = []
            for j in range(0, rows, 2):
                vs += code.load_two(code.plus(here[j // BLOCK], j % BLOCK * form.vector_bytes), form)
            for a in here if fetches else ():
                for line in range(0, min(rows, BLOCK) * form.vector_bytes, 64):
                    code.fetch_once(code.plus(code.add(a, ahead), line))
            sums[:] = [code.product(form, sums[t * rows + j], xs[t], vs[j]) for t in range(tokens) for j in range(rows)]
        total = code.sums_of(sums + [code.zeros(lanes)] * (lanes - len(sums)))
        for t in range(tokens):
            part = code.part(total, t * rows, rows)
            code.store(part, code.add(h, code.times(h_stride, t)))

    @intrinsic
    def tile(context, x_rows, v, v_block, turns, h, h_stride, ahead):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), generating(body)

    return tile


def expand_tile(form: Form, tokens: int, vectors: int, depth: int, fetches: bool = True) -> Any:
    """numba intrinsic ``(y_rows, offset, u, g, g_stride, pieces, ahead)``: ``y[t] += U g[t]``.

    All int64. y_rows: address of the addresses of ``tokens`` rows; offset: bytes to the first output in a row; u:
    address of ``vectors`` blocks in the layout of `lay_u`, of ``depth`` vectors each; g: fp32 [tokens, R], or pairs of
    bf16, its rows ``g_stride`` bytes apart; pieces: ``depth / PIECE``, unknown to the compiler, which would undo the
    loop; ahead: as for shrink. y is rounded once.
    """
    lanes = form.lanes
    width = 2 if form.stored == torch.bfloat16 else 4
    span = vectors * lanes * width

    def body(code: Code, y_rows: Any, offset: Any, u: Any, g: Any, g_stride: Any, pieces: Any, ahead: Any) -> None:
        y_at = [code.add(code.load_i64(y_rows, 8 * t), offset) for t in range(tokens)]
        g_at = [code.add(g, code.times(g_stride, t)) for t in range(tokens)]
        for a in y_at:
            for line in range(0, span, 64):
                code.fetch_near(code.plus(a, 2 * span + line))
        before = [code.load_output(code.plus(a, k * lanes * width), form) for a in y_at for k in range(vectors)]
        with code.loop(pieces, before) as (turn, sums):
            of_u = code.add(u, code.times(turn, PIECE * form.vector_bytes))
            of_g = [code.add(a, code.times(turn, 4 * PIECE)) for a in g_at]
            # Constant distances from here: one register holds all of U's addresses.
            places = [k * depth * form.vector_bytes for k in range(vectors)]
            if form.looked_up:
                gs = [[code.broadcast(code.plus(a, 4 * step), form) for a in of_g] for step in range(PIECE)]
                for k, at in enumerate(places):  # one after the other: few registers are left
                    us = code.load_two(code.plus(of_u, at), form)
                    if fetches:
                        code.fetch_once(code.plus(code.add(of_u, ahead), at))
                    for t in range(tokens):
                        for step in range(PIECE):
                            i = t * vectors + k
                            sums[i] = code.product(form, sums[i], gs[step][t], us[step])
            else:
                for step in range(PIECE):
                    here = [at + step * form.vector_bytes for at in places]
                    us = [code.load(code.plus(of_u, at), lanes, form, "basis") for at in here]
                    gs = [code.broadcast(code.plus(a, 4 * step), form) for a in of_g]
                    for at in here if fetches else ():
                        code.fetch_once(code.plus(code.add(of_u, ahead), at))
                    sums[:] = [
                        code.product(form, sums[t * vectors + k], gs[t], us[k])
                        for t in range(tokens)
                        for k in range(vectors)
                    ]
        for t, address in enumerate(y_at):
            for k in range(vectors):
                code.store_output(sums[t * vectors + k], code.plus(address, k * lanes * width), form)

    @intrinsic
    def tile(context, y_rows, offset, u, g, g_stride, pieces, ahead):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), generating(body)

    return tile


def sigma_tile(form: Form, lanes: int, diagonal: bool) -> Any:
    """numba intrinsic ``(sigma, stride, turns, h, g, scale)``: ``g[r] = Σ[r] · h`` for as many rows r as lanes.

    All int64 addresses of fp32 but Σ, which is of the dtype of x and y, and g, which is bf16 for pairs. Σ lies column
    by column, ``stride`` bytes apart, ``4 · turns`` of them. A diagonal Σ is a vector of lanes, as is h. With bases of
    8 bits g is multiplied by what lies at ``scale``. Products and sums are fp32.
    """
    kept, stored = Form(torch.float32, False, lanes), Form(form.stored, False, lanes)

    def body(code: Code, sigma: Any, stride: Any, turns: Any, h: Any, g: Any, scale: Any) -> None:
        if diagonal:
            total = code.times_each(code.load(sigma, lanes, stored, "basis"), code.load(h, lanes, kept, "x"))
        else:
            with code.loop(turns, [code.zeros(lanes)] * SIGMA_COLUMNS) as (turn, sums):
                for c in range(SIGMA_COLUMNS):
                    column = code.plus(code.times(turn, SIGMA_COLUMNS), c)
                    of_sigma = code.load(code.add(sigma, code.times(column, stride)), lanes, stored, "basis")
                    of_h = code.broadcast(code.add(h, code.times(column, 4)), kept)
                    sums[c] = code.product(kept, sums[c], of_sigma, of_h)
            total = code.plus_each(code.plus_each(sums[0], sums[1]), code.plus_each(sums[2], sums[3]))
        if form.eight_bit is not None:
            total = code.times_each(total, code.load(scale, lanes, kept, "x"))
        code.store_output(total, g, replace(kept, stored=torch.bfloat16 if form.pairs else torch.float32))

    @intrinsic
    def tile(context, sigma, stride, turns, h, g, scale):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 6), generating(body)

    return tile


def fetching() -> Any:
    """numba intrinsic ``(address, lines)``: asks for so many lines of memory, at least 1, to be read soon."""

    def body(code: Code, address: Any, lines: Any) -> None:
        with code.loop(lines, []) as (line, _):
            code.fetch_second(code.add(address, code.times(line, 64)))

    @intrinsic
    def fetch(context, address, lines):  # type: ignore[no-untyped-def]
        return types.void(types.int64, types.int64), generating(body)

    return fetch
