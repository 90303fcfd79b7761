"""``y[token(p)] += U[c(p), i] · g[i, p]`` for all slices i of a packed module in one launch, on a GPU.

Rows of y are added to in fp32 and rounded once. Σ may be applied here (``SCALING``): that saves a launch and the trip
of g through memory, and every program of a slice's columns reads Σ again, so it pays for small ranks and batches.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations have no Triton
    triton = None

from vllm_jdlora.kernels.packed_module import BLOCK_COLUMNS, PackedModule
from vllm_jdlora.kernels.token_tiles import TokenTiles, max_tiles
from vllm_jdlora.kernels.triton_sigma import DIAGONAL, NO_SCALING, block_of, scaling_of
from vllm_jdlora.kernels.triton_widen import FP8, INT8, WIDE, widened

_MAX_BLOCK_R = {WIDE: 128, INT8: 64, FP8: 64}  # more of U at a time costs registers; 8 bits become 16
PARTS_AT_A_TIME = 8


def constants_of(
    rank: int, slices: int, rows: int, hint: int, scaling: int, add_inputs: bool, stored: int = WIDE
) -> dict[str, int]:
    """Compile-time sizes of one launch; larger chunks of Σ cost registers, and spill from R = 64 on."""
    return {
        "SLICES": slices,
        "R": rank,
        "BLOCK_R": block_of(rank) if scaling else min(_MAX_BLOCK_R[stored], block_of(rank)),
        "BLOCK_M": rows,
        "BLOCK_N": BLOCK_COLUMNS,
        "SCALING": scaling,
        "CHUNK": 16 if rank <= 16 else 8,
        "PARTS": PARTS_AT_A_TIME,
        "HINT": hint,
        "ADD": int(add_inputs),
        "STORED": stored,
    }


def warps_of(rank: int, rows: int, scaling: int) -> int:
    """Eight for tall tiles and wide diagonals: with four, sm_80 spills. Eight read a narrow diagonal 2 bytes each."""
    return 4 if rows <= 16 and (scaling != DIAGONAL or rank <= 16) else 8


if triton is not None:

    @triton.jit
    def _directions(  # type: ignore[no-untyped-def]
        u_pointers_ptr,
        module_slice,
        cluster,
        eight_bit_clusters,
        n,
        j,
        width,
        R: tl.constexpr,
        SLICES: tl.constexpr,
        STORED: tl.constexpr,
        dtype: tl.constexpr,
    ):
        """Uᵀ of a cluster at rows n of U and columns j, as ``dtype`` [j, n]; 8-bit ones without their scales."""
        inside = (n < width)[None, :] & (j < R)[:, None]
        at = n[None, :] * R + j[:, None]
        # The hint must sit on the pointer, not on the integer: without it weights are loaded 2 bytes at a time.
        wide = tl.multiple_of(tl.load(u_pointers_ptr + module_slice).to(tl.pointer_type(dtype)), 16)
        if STORED == 0:
            u = tl.load(wide + cluster.to(tl.int64) * width * R + at, mask=inside, other=0)
        elif cluster < eight_bit_clusters:
            narrow = tl.load(u_pointers_ptr + SLICES + module_slice).to(tl.pointer_type(tl.int8))
            narrow = tl.multiple_of(narrow, 16) + cluster.to(tl.int64) * width * R
            u = widened(tl.load(narrow + at, mask=inside, other=0), STORED, dtype)
        else:
            wide_cluster = (cluster - eight_bit_clusters).to(tl.int64)
            u = tl.load(wide + wide_cluster * width * R + at, mask=inside, other=0)
        return u

    @triton.jit
    def _scales(  # type: ignore[no-untyped-def]
        u_scale_ptr, module_slice, cluster, eight_bit_clusters, j, R: tl.constexpr, SLICES: tl.constexpr
    ):
        """Scales of U's columns j, fp32; 1 for wide clusters."""
        columns = tl.where(cluster < eight_bit_clusters, R, 0)
        return tl.load(u_scale_ptr + (cluster * SLICES + module_slice) * R + j, mask=j < columns, other=1.0)

    @triton.jit(do_not_specialize=["tokens", "parts", "eight_bit_clusters"])
    def expand_kernel(  # type: ignore[no-untyped-def]
        g_ptr,
        sigma_ptr,
        u_pointers_ptr,
        u_scale_ptr,
        y_ptr,
        column_ptr,
        tile_ptr,
        token_ptr,
        slot_ptr,
        tokens,
        parts,
        eight_bit_clusters,
        tile_stride,
        y_stride,
        first_column,
        sigma_slot_stride,
        sigma_slice_stride,
        SLICES: tl.constexpr,
        R: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        SCALING: tl.constexpr,
        CHUNK: tl.constexpr,
        PARTS: tl.constexpr,
        HINT: tl.constexpr,
        ADD: tl.constexpr,
        STORED: tl.constexpr,
    ):
        """Grid (column tiles, tiles). SCALING 0: g [slices, tokens, R] holds Σ V x. Else g is h of the shrink,
        fp32 [parts, slices, tokens, R], and Σ is full (1) or diagonal (2). Rows of both are sorted rows.

        STORED: the first ``eight_bit_clusters`` are int8 (1) or fp8 (2); the others, and all with 0, are wide.
        """
        tile = tl.program_id(1)
        cluster = tl.load(tile_ptr + tile)
        if cluster < 0:
            return
        entry = column_ptr + tl.program_id(0) * 4
        module_slice = tl.load(entry)
        first = tl.multiple_of(tl.load(entry + 1), HINT)
        width = tl.multiple_of(tl.load(entry + 2), HINT)
        column = tl.multiple_of(tl.load(entry + 3), HINT)
        start = tl.load(tile_ptr + tile_stride + tile)
        length = tl.load(tile_ptr + 2 * tile_stride + tile)
        m = tl.arange(0, BLOCK_M)
        live = m < length
        token = tl.load(token_ptr + start + m, mask=live, other=0)
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        n = first + tl.arange(0, BLOCK_N)
        g_row = g_ptr + (module_slice.to(tl.int64) * tokens + start + m) * R
        if SCALING == 0:
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for first_j in range(0, R, BLOCK_R):
                j = first_j + tl.arange(0, BLOCK_R)
                g = tl.load(g_row[:, None] + j[None, :], mask=live[:, None] & (j < R)[None, :], other=0.0)
                if STORED != 0:
                    scale = _scales(u_scale_ptr, module_slice, cluster, eight_bit_clusters, j, R, SLICES)
                    g = (g * scale[None, :]).to(dtype)
                u = _directions(
                    u_pointers_ptr, module_slice, cluster, eight_bit_clusters, n, j, width, R, SLICES, STORED, dtype
                )
                sums = tl.dot(g, u, sums)
        else:
            i = tl.arange(0, BLOCK_R)
            slot = tl.load(slot_ptr + start + m, mask=live, other=0)
            scaling = sigma_ptr + slot.to(tl.int64) * sigma_slot_stride + module_slice * sigma_slice_stride
            part_stride = tokens.to(tl.int64) * (SLICES * R)
            scaled = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            if SCALING == 1:
                for first_j in range(0, BLOCK_R, CHUNK):
                    j = first_j + tl.arange(0, CHUNK)
                    by_part = tl.zeros((BLOCK_M, PARTS, CHUNK), dtype=tl.float32)
                    for first_part in range(0, parts, PARTS):
                        part = first_part + tl.arange(0, PARTS)
                        inside = live[:, None, None] & (part < parts)[None, :, None] & (j < R)[None, None, :]
                        h_parts = g_row[:, None, None] + (part * part_stride)[None, :, None] + j[None, None, :]
                        by_part += tl.load(h_parts, mask=inside, other=0.0)
                    h = tl.sum(by_part, axis=1)
                    inside = live[:, None, None] & (i < R)[None, :, None] & (j < R)[None, None, :]
                    chunk = tl.load(
                        scaling[:, None, None] + i[None, :, None] * R + j[None, None, :], mask=inside, other=0.0
                    )
                    scaled += tl.sum(chunk.to(tl.float32) * h[:, None, :], axis=2)
            else:
                inside = live[:, None] & (i < R)[None, :]
                for part in range(parts):
                    scaled += tl.load(g_row[:, None] + part * part_stride + i[None, :], mask=inside, other=0.0)
                scaled *= tl.load(scaling[:, None] + i[None, :], mask=inside, other=0.0).to(tl.float32)
            if STORED != 0:
                scaled *= _scales(u_scale_ptr, module_slice, cluster, eight_bit_clusters, i, R, SLICES)[None, :]
            u = _directions(
                u_pointers_ptr, module_slice, cluster, eight_bit_clusters, n, i, width, R, SLICES, STORED, dtype
            )
            sums = tl.dot(scaled.to(dtype), u)
        y_row = y_ptr + token.to(tl.int64) * y_stride + first_column + column
        inside = live[:, None] & (n < width)[None, :]
        if ADD:
            # Widened before the sum: fp32, and the interpreter adds bf16 as bit patterns.
            sums += tl.load(y_row[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y_row[:, None] + n[None, :], sums.to(dtype), mask=inside)


def jd_expand_(
    y: torch.Tensor,
    g: torch.Tensor,
    sigma: torch.Tensor | None,
    module: PackedModule,
    tiles: TokenTiles,
    *,
    tokens: int,
    rows: int,
    parts: int = 1,
    first_column: int = 0,
    add_inputs: bool = True,
) -> None:
    """``y[token(p)] += U[c(p), i] · g[i, p]`` for every sorted row p with an adapter; other rows keep their bits.

    Args:
        y: fp16 or bf16 [T, columns], rows dense.
        g: without ``sigma`` dtype of y, or fp32 for bases of 8 bits, whose scales it is still to be multiplied with;
            seen as [slices, T, R]. With it h of the shrink, fp32 [parts, slices, T, R].
        sigma: to apply to h here: [slots, slices, R, R] or [slots, slices, R]; None: g is scaled already.
        module: holds U.
        tiles: the step's plan.
        tokens: T, padded.
        rows: of a tile.
        parts: of h.
        first_column: of y, for the first slice.
        add_inputs: False writes over y.
    """
    step = tiles.tiles(rows)
    scaling = NO_SCALING if sigma is None else scaling_of(sigma)
    eight_bit = module.eight_bit
    stored = WIDE if eight_bit is None else eight_bit.stored
    expand_kernel[(len(module.columns), max_tiles(tokens, rows, tiles.clusters))](
        g,
        g if sigma is None else sigma,
        module.u_pointers,
        g if eight_bit is None else eight_bit.u_scale,
        y,
        module.columns,
        step,
        tiles.sorted_token,
        tiles.sorted_slot,
        tokens,
        parts,
        0 if eight_bit is None else eight_bit.clusters,
        step.stride(0),
        y.stride(0),
        first_column,
        0 if sigma is None else sigma.stride(0),
        0 if sigma is None else sigma.stride(1),
        **constants_of(module.rank, module.slices, rows, module.hint, scaling, add_inputs, stored),
        num_warps=warps_of(module.rank, rows, scaling),
        num_stages=1,
    )
