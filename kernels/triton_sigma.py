"""``g[p, i] = Σ[s(p), i] · Σ_parts h[part, i, p]`` on a GPU: adds up the shrink's parts and scales, in one launch.

One program makes one row of one slice. The grid is a function of the padded token count and of the layer alone; each
row is summed in one fixed order that does not depend on the batch. There is no ``tl.dot`` here.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations have no Triton
    triton = None

from vllm_jdlora.kernels.token_tiles import TokenTiles

# Elements of Σ, and of parts of h, that a program holds at a time: 32 registers for each of 128 threads.
_TILE_ELEMENTS = 4096
_MAX_PARTS_AT_A_TIME = 32
NO_SCALING, FULL, DIAGONAL = 0, 1, 2


def block_of(rank: int) -> int:
    """R padded to a power of two, as tl.arange demands; 16 or more, as tl.dot does."""
    return max(16, 1 << (rank - 1).bit_length())


def scaling_of(sigma: torch.Tensor) -> int:
    """FULL for [slots, slices, R, R], DIAGONAL for [slots, slices, R]."""
    return FULL if sigma.ndim == 4 else DIAGONAL


def constants_of(rank: int, slices: int, scaling: int) -> dict[str, int]:
    """Compile-time sizes for one rank, in closed form, because autotuning needs syncs."""
    block_r = block_of(rank)
    return {
        "SLICES": slices,
        "R": rank,
        "BLOCK_R": block_r,
        "ROWS": min(block_r, _TILE_ELEMENTS // block_r),
        "PARTS": min(_MAX_PARTS_AT_A_TIME, _TILE_ELEMENTS // block_r),
        "SCALING": scaling,
    }


def warps_of(rank: int) -> int:
    """A Σ of R = 16 feeds one warp; from R = 64 on four warps have 32 elements a thread."""
    block_r = block_of(rank)
    return max(1, min(4, block_r * block_r // 1024))


if triton is not None:

    @triton.jit(do_not_specialize=["tokens", "parts"])
    def sigma_kernel(  # type: ignore[no-untyped-def]
        h_ptr,
        g_ptr,
        sigma_ptr,
        slot_ptr,
        tokens,
        parts,
        sigma_slot_stride,
        sigma_slice_stride,
        SLICES: tl.constexpr,
        R: tl.constexpr,
        BLOCK_R: tl.constexpr,
        ROWS: tl.constexpr,
        PARTS: tl.constexpr,
        SCALING: tl.constexpr,
    ):
        """h [parts, slices, tokens, R] fp32, g [slices, tokens, R], by sorted row; grid (tokens, slices)."""
        position = tl.program_id(0)
        module_slice = tl.program_id(1)
        slot = tl.load(slot_ptr + position)
        if slot < 0:
            return
        column = tl.arange(0, BLOCK_R)
        row = (module_slice.to(tl.int64) * tokens + position) * R
        part_stride = tokens.to(tl.int64) * (SLICES * R)
        by_part = tl.zeros((PARTS, BLOCK_R), dtype=tl.float32)
        for first_part in range(0, parts, PARTS):
            part = first_part + tl.arange(0, PARTS)
            inside = (part < parts)[:, None] & (column < R)[None, :]
            h_parts = h_ptr + row + (part * part_stride)[:, None] + column[None, :]
            by_part += tl.load(h_parts, mask=inside, other=0.0)
        h = tl.sum(by_part, axis=0)
        scaling = sigma_ptr + slot.to(tl.int64) * sigma_slot_stride + module_slice * sigma_slice_stride
        if SCALING == 1:
            for first_row in range(0, BLOCK_R, ROWS):
                i = first_row + tl.arange(0, ROWS)
                inside = (i < R)[:, None] & (column < R)[None, :]
                tile = tl.load(scaling + i[:, None] * R + column[None, :], mask=inside, other=0.0)
                # Widened before any arithmetic: products of bf16 or fp16 are not exact in their own type.
                scaled = tl.sum(tile.to(tl.float32) * h[None, :], axis=1)
                tl.store(g_ptr + row + i, scaled.to(g_ptr.dtype.element_ty), mask=i < R)
        else:
            if SCALING == 2:
                h *= tl.load(scaling + column, mask=column < R, other=0.0).to(tl.float32)
            tl.store(g_ptr + row + column, h.to(g_ptr.dtype.element_ty), mask=column < R)


def jd_sigma_(
    g: torch.Tensor,
    h: torch.Tensor,
    sigma: torch.Tensor | None,
    tiles: TokenTiles,
    *,
    tokens: int,
    parts: int,
    slices: int,
    rank: int,
) -> None:
    """``g[i, p] = Σ[s(p), i] · Σ_parts h[part, i, p]`` for every sorted row p with an adapter; others stay as they are.

    Args:
        g: fp16, bf16 or fp32, at least slices · T · R numbers; seen as [slices, T, R].
        h: fp32, at least parts · slices · T · R numbers; seen as [parts, slices, T, R].
        sigma: bf16, fp16 or fp32 [slots, slices, R, R] (JD-Full) or [slots, slices, R] (JD-Diag), each Σ dense; may be
            a view of a wider buffer in its first two axes. None only adds up.
        tiles: the step's plan.
        tokens: T, padded.
        parts: of h.
        slices: of h and g.
        rank: R.
    """
    scaling = NO_SCALING if sigma is None else scaling_of(sigma)
    sigma_kernel[(tokens, slices)](
        h,
        g,
        h if sigma is None else sigma,
        tiles.sorted_slot,
        tokens,
        parts,
        0 if sigma is None else sigma.stride(0),
        0 if sigma is None else sigma.stride(1),
        **constants_of(rank, slices, scaling),
        num_warps=warps_of(rank),
        num_stages=1,
    )
