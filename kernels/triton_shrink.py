"""``h[p, i] = V[c(p), i] · x[token(p)]`` for all slices i of a packed module in one launch, on a GPU.

Columns of different slices share a tile of the product, so x is read once for q, k and v. The input dimension may be
split: each part stores its own fp32 sums, which the reader adds in their order. Nothing is added atomically and
nothing need be zeroed, so equal input gives equal bits.

A batch of few tokens may be multiplied with the V of all clusters, keeping for each token what its own cluster gave
(``Launch.dense``): that reads clusters which nobody asked for, and no load of V waits for the look-up of a cluster.
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
from vllm_jdlora.kernels.triton_widen import WIDE, widened

BLOCK_K = 128
_MAX_PARTS = 32
_INVARIANT_PARTS = 8
_WAVES = 2  # programs for each multiprocessor
# What device memory delivers in the time of one look-up, about 0.5 µs on the slowest GPU of the traffic model.
_BYTES_OF_A_LOOKUP = 1 << 20


def reads_all_clusters(tokens: int, clusters: int, v_bytes: int) -> bool:
    """Whether a shrink of so many tokens takes every cluster's V (``v_bytes`` each), by the model in ``traffic.py``.

    It does where one tile holds the tokens and where so few clusters are expected to stay without a token that reading
    them takes no longer than looking up who is where.
    """
    unread = clusters * (1 - 1 / clusters) ** tokens
    return tokens <= DECODE_ROWS and unread * v_bytes <= _BYTES_OF_A_LOOKUP


@dataclass(frozen=True)
class Launch:
    """Sizes of one launch; of padded tokens and shapes alone, never of what the batch holds.

    Attributes:
        rows: tokens of a tile.
        tiles: tiles that so many tokens can need.
        block_n: columns (slices · R) of a program.
        blocks: programs for a tile's columns; of all clusters if ``dense``.
        parts: parts of the input dimension.
        iterations: blocks of ``BLOCK_K`` in a part.
        dense: every cluster's V is multiplied with.
    """

    rows: int
    tiles: int
    block_n: int
    blocks: int
    parts: int
    iterations: int
    dense: bool

    @classmethod
    def of(
        cls,
        tokens: int,
        clusters: int,
        columns: int,
        d_in: int,
        multiprocessors: int,
        batch_invariant: bool,
        *,
        number_bytes: int = 2,
        dense: bool | None = None,
    ) -> Launch:
        """Enough parts to fill the GPU with ``tokens`` tokens.

        Args:
            tokens: T, padded.
            clusters: pairs of bases.
            columns: slices · R.
            d_in: of the module.
            multiprocessors: of the GPU.
            batch_invariant: the same sizes for any ``tokens``.
            number_bytes: of a number of V.
            dense: None: by :func:`reads_all_clusters`.
        """
        rows = DECODE_ROWS if batch_invariant or tokens <= PREFILL_TOKENS else PREFILL_ROWS
        if dense is None:
            dense = not batch_invariant and reads_all_clusters(tokens, clusters, columns * d_in * number_bytes)
        tiles = -(-tokens // rows) if dense else max_tiles(tokens, rows, clusters)
        block_n = min(64, max(16, 1 << (columns - 1).bit_length()))
        blocks = -(-columns // block_n) * (clusters if dense else 1)
        steps = -(-d_in // BLOCK_K)
        wanted = _INVARIANT_PARTS if batch_invariant else _WAVES * multiprocessors // (tiles * blocks)
        iterations = -(-steps // max(1, min(wanted, _MAX_PARTS, steps)))
        return cls(rows, tiles, block_n, blocks, -(-steps // iterations), iterations, dense)


def constants_of(rank: int, slices: int, launch: Launch, stored: int = WIDE) -> dict[str, int]:
    """Compile-time sizes of one launch."""
    return {
        "SLICES": slices,
        "R": rank,
        "BLOCK_M": launch.rows,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": BLOCK_K,
        "STORED": stored,
        "DENSE": int(launch.dense),
    }


def most_part_rows(capacity: int, multiprocessors: int, batch_invariant: bool) -> int:
    """The largest parts · tokens of any step of at most ``capacity`` tokens: rows of scratch for each slice."""
    if batch_invariant:
        return _INVARIANT_PARTS * capacity
    return max(capacity, _WAVES * multiprocessors * PREFILL_ROWS)


if triton is not None:

    @triton.jit
    def _product(  # type: ignore[no-untyped-def]
        x_row,
        v_row,
        live,
        inside,
        k,
        iterations,
        d_in,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STORED: tl.constexpr,
    ):
        """x · Vᵀ over ``iterations`` blocks from k on, fp32 [BLOCK_M, BLOCK_N]."""
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for _ in range(iterations):
            v = tl.load(v_row[None, :] + k[:, None], mask=inside[None, :] & (k < d_in)[:, None], other=0)
            x = tl.load(x_row[:, None] + k[None, :], mask=live[:, None] & (k < d_in)[None, :], other=0)
            if STORED != 0:
                v = widened(v, STORED, x.dtype)
            sums = tl.dot(x, v, sums)
            k += BLOCK_K
        return sums

    # The token count changes from step to step: specialising on 1 or multiples of 16 would compile inside one.
    @triton.jit(do_not_specialize=["tokens", "iterations", "eight_bit_clusters"])
    def shrink_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        v_pointers_ptr,
        v_scale_ptr,
        h_ptr,
        tile_ptr,
        token_ptr,
        cluster_ptr,
        tokens,
        iterations,
        eight_bit_clusters,
        tile_stride,
        d_in,
        x_stride,
        v_cluster_stride,
        SLICES: tl.constexpr,
        R: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        STORED: tl.constexpr,
        DENSE: tl.constexpr,
    ):
        """h [parts, slices, tokens, R] fp32 by sorted row; grid (tiles, cdiv(slices · R, BLOCK_N), parts).

        DENSE: tiles are of sorted rows whatever their clusters, and the second axis of the grid goes over the clusters
        as well. STORED: the first ``eight_bit_clusters`` are int8 (1) or fp8 (2); the others, and all with 0, are wide.
        """
        m = tl.arange(0, BLOCK_M)
        if DENSE:
            # V depends on nothing that is looked up, so its first loads start at once.
            blocks: tl.constexpr = (SLICES * R + BLOCK_N - 1) // BLOCK_N
            cluster = tl.program_id(1) // blocks
            block = tl.program_id(1) % blocks
            start = tl.program_id(0) * BLOCK_M
            cluster_of_row = tl.load(cluster_ptr + start + m, mask=start + m < tokens, other=-1)
            live = cluster_of_row >= 0
            mine = cluster_of_row == cluster
        else:
            tile = tl.program_id(0)
            cluster = tl.load(tile_ptr + tile)
            if cluster < 0:
                return
            block = tl.program_id(1)
            start = tl.load(tile_ptr + tile_stride + tile)
            length = tl.load(tile_ptr + 2 * tile_stride + tile)
            live = m < length
            mine = live
        token = tl.load(token_ptr + start + m, mask=live, other=0)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < SLICES * R
        x_row = x_ptr + token.to(tl.int64) * x_stride
        part = tl.program_id(2)
        k = part * iterations * BLOCK_K + tl.arange(0, BLOCK_K)
        address = tl.load(v_pointers_ptr + n // R, mask=inside, other=0)
        # The hint must sit on the pointer, not on the integer: without it weights are loaded 2 bytes at a time.
        v_slice = tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
        if STORED == 0:
            v_row = v_slice + cluster.to(tl.int64) * v_cluster_stride + (n % R) * d_in
            sums = _product(x_row, v_row, live, inside, k, iterations, d_in, BLOCK_M, BLOCK_N, BLOCK_K, 0)
        elif cluster < eight_bit_clusters:
            address = tl.load(v_pointers_ptr + SLICES + n // R, mask=inside, other=0)
            v_slice_8 = tl.multiple_of(address.to(tl.pointer_type(tl.int8)), 16)
            v_row_8 = v_slice_8 + (cluster.to(tl.int64) * R + n % R) * d_in
            sums = _product(x_row, v_row_8, live, inside, k, iterations, d_in, BLOCK_M, BLOCK_N, BLOCK_K, STORED)
            scale = tl.load(v_scale_ptr + cluster * (SLICES * R) + n, mask=inside, other=0.0)
            sums *= scale[None, :]
        else:
            wide_cluster = (cluster - eight_bit_clusters).to(tl.int64)
            v_row = v_slice + wide_cluster * v_cluster_stride + (n % R) * d_in
            sums = _product(x_row, v_row, live, inside, k, iterations, d_in, BLOCK_M, BLOCK_N, BLOCK_K, 0)
        h_slice = h_ptr + ((part * SLICES + n // R).to(tl.int64) * tokens + start) * R + n % R
        tl.store(h_slice[None, :] + (m * R)[:, None], sums, mask=mine[:, None] & inside[None, :])


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
    eight_bit = module.eight_bit
    shrink_kernel[(launch.tiles, launch.blocks, launch.parts)](
        x,
        module.v_pointers,
        h if eight_bit is None else eight_bit.v_scale,
        h,
        step,
        tiles.sorted_token,
        tiles.sorted_cluster,
        x.shape[0],
        launch.iterations,
        0 if eight_bit is None else eight_bit.clusters,
        step.stride(0),
        module.d_in,
        x.stride(0),
        module.v_cluster_stride,
        **constants_of(module.v_rank, module.slices, launch, WIDE if eight_bit is None else eight_bit.stored),
        num_warps=4,
        num_stages=3,
    )
