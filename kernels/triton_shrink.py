"""``h[p, i] = V[c(p), i] · x[token(p)]`` for all slices i of a packed module in one launch, on a GPU.

Columns of different slices share a tile of the product, so x is read once for q, k and v. The input dimension may be
split: each part stores its own fp32 sums, which the reader adds in their order. Nothing is added atomically and
nothing need be zeroed, so equal input gives equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations have no Triton
    triton = None

from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.token_tiles import DECODE_ROWS, PREFILL_ROWS, PREFILL_TOKENS, TokenTiles, max_tiles

BLOCK_K = 128
_MAX_PARTS = 32
_INVARIANT_PARTS = 8
_WAVES = 2  # programs for each multiprocessor


@dataclass(frozen=True)
class Launch:
    """Sizes of one launch; of padded tokens and shapes alone, never of what the batch holds.

    Attributes:
        rows: tokens of a tile.
        tiles: tiles that so many tokens can need.
        block_n: columns (slices · R) of a program.
        parts: parts of the input dimension.
        iterations: blocks of ``BLOCK_K`` in a part.
    """

    rows: int
    tiles: int
    block_n: int
    parts: int
    iterations: int

    @classmethod
    def of(
        cls, tokens: int, clusters: int, columns: int, d_in: int, multiprocessors: int, batch_invariant: bool
    ) -> Launch:
        """Enough parts to fill the GPU with ``tokens`` tokens; ``batch_invariant``: the same for any ``tokens``."""
        rows = DECODE_ROWS if batch_invariant or tokens <= PREFILL_TOKENS else PREFILL_ROWS
        tiles = max_tiles(tokens, rows, clusters)
        block_n = min(64, max(16, 1 << (columns - 1).bit_length()))
        blocks = -(-d_in // BLOCK_K)
        wanted = _INVARIANT_PARTS if batch_invariant else _WAVES * multiprocessors // (tiles * -(-columns // block_n))
        iterations = -(-blocks // max(1, min(wanted, _MAX_PARTS, blocks)))
        return cls(rows, tiles, block_n, parts=-(-blocks // iterations), iterations=iterations)


def most_part_rows(capacity: int, multiprocessors: int, batch_invariant: bool) -> int:
    """The largest parts · tokens of any step of at most ``capacity`` tokens: rows of scratch for each slice."""
    if batch_invariant:
        return _INVARIANT_PARTS * capacity
    return max(capacity, _WAVES * multiprocessors * PREFILL_ROWS)


if triton is not None:
    # The token count changes from step to step: specialising on 1 or multiples of 16 would compile inside one.
    @triton.jit(do_not_specialize=["tokens", "iterations"])
    def shrink_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        v_pointers_ptr,
        h_ptr,
        tile_ptr,
        token_ptr,
        tokens,
        iterations,
        tile_stride,
        d_in,
        x_stride,
        v_cluster_stride,
        SLICES: tl.constexpr,
        R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        """h [parts, slices, tokens, R] fp32 by sorted row; grid (tiles, cdiv(slices · R, BLOCK_N), parts)."""
        tile = tl.program_id(0)
        cluster = tl.load(tile_ptr + tile)
        if cluster < 0:
            return
        start = tl.load(tile_ptr + tile_stride + tile)
        length = tl.load(tile_ptr + 2 * tile_stride + tile)
        m = tl.arange(0, BLOCK_M)
        live = m < length
        token = tl.load(token_ptr + start + m, mask=live, other=0)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < SLICES * R
        address = tl.load(v_pointers_ptr + n // R, mask=inside, other=0)
        # The hint must sit on the pointer, not on the integer: without it weights are loaded 2 bytes at a time.
        v_slice = tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        v_row = v_slice + cluster.to(tl.int64) * v_cluster_stride + (n % R) * d_in
        x_row = x_ptr + token.to(tl.int64) * x_stride
        part = tl.program_id(2)
        k = part * iterations * BLOCK_K + tl.arange(0, BLOCK_K)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(iterations):
            v = tl.load(v_row[None, :] + k[:, None], mask=inside[None, :] & (k < d_in)[:, None], other=0.0)
            x = tl.load(x_row[:, None] + k[None, :], mask=live[:, None] & (k < d_in)[None, :], other=0.0)
            sums = tl.dot(x, v, sums)
            k += BLOCK_K
        h_slice = h_ptr + ((part * SLICES + n // R).to(tl.int64) * tokens + start) * R + n % R
        tl.store(h_slice[None, :] + (m * R)[:, None], sums, mask=live[:, None] & inside[None, :])


def jd_shrink_(h: torch.Tensor, x: torch.Tensor, module: PackedModule, tiles: TokenTiles, launch: Launch) -> None:
    """``h[p, i] = V[c(p), i] · x[token(p)]`` for every sorted row p with an adapter; other rows of h stay as they are.

    Args:
        h: fp32, at least parts · slices · T · R numbers; seen as [parts, slices, T, R], to be added over parts.
        x: fp16 or bf16 [T, d_in], rows dense.
        module: holds V.
        tiles: the step's plan.
        launch: ``Launch.of`` T and the module's shapes.
    """
    step = tiles.tiles(launch.rows)
    shrink_kernel[(launch.tiles, -(-module.slices * module.v_rank // launch.block_n), launch.parts)](
        x,
        module.v_pointers,
        h,
        step,
        tiles.sorted_token,
        x.shape[0],
        launch.iterations,
        step.stride(0),
        module.d_in,
        x.stride(0),
        module.v_cluster_stride,
        SLICES=module.slices,
        R=module.v_rank,
        BLOCK_M=launch.rows,
        BLOCK_N=launch.block_n,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=3,
    )
