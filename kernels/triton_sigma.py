"""Scaling matrices between vLLM's own shrink and expand, on a GPU: ``h[i, t] ← Σ[s(t), i] · h[i, t]`` in place.

One program handles one token of one module slice (JD-Full) or a block of tokens of one slice (JD-Diag). The grid is a
function of the padded token count and of the layer alone; a launch allocates nothing, waits for nothing and tunes
nothing, so it may be captured in a CUDA graph and replayed with other slots. Each row is summed in one fixed order that
does not depend on the batch.

There is no ``tl.dot`` here: the miscompiled wgmma that made vLLM 0.33 limit its expand kernel to one stage on sm_90
(triton-lang/triton#9433) cannot occur. Without Triton the module imports, and calling it raises ``JDLoRAError``.
"""

from dataclasses import dataclass

import torch

from vllm_jdlora.errors import JDLoRAError

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations have no Triton
    triton = None

# Σ elements that a program holds at a time. 32 fp32 registers for each of 128 threads: no spill on sm_80 … sm_120.
_TILE_ELEMENTS = 4096
_DIAG_TOKENS = 16


@dataclass(frozen=True)
class Launch:
    """Compile-time sizes of both kernels for one rank; a table in closed form, because autotuning needs syncs."""

    block_r: int  # R padded to a power of two, as tl.arange demands
    rows: int  # rows of Σ at a time
    num_warps: int

    @classmethod
    def for_rank(cls, rank: int) -> "Launch":
        block_r = max(16, 1 << (rank - 1).bit_length())
        rows = min(block_r, _TILE_ELEMENTS // block_r)
        # A tile of R = 16 feeds one warp; from R = 64 on four warps have 32 elements a thread.
        return cls(block_r, rows, num_warps=max(1, min(4, rows * block_r // 1024)))


if triton is not None:
    # T changes from step to step: specialising on T = 1 or T % 16 = 0 would compile inside a serving step.
    @triton.jit(do_not_specialize=["tokens"])
    def sigma_full_kernel(  # type: ignore[no-untyped-def]
        h_ptr,
        sigma_ptr,
        token_slot_ptr,
        tokens,
        sigma_slot_stride,
        sigma_slice_stride,
        R: tl.constexpr,
        BLOCK_R: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """h [slices, T, R] fp32, Σ [slots, slices, R, R] with dense [R, R]; grid (T, slices)."""
        token = tl.program_id(0)
        module_slice = tl.program_id(1)
        column = tl.arange(0, BLOCK_R)
        h_row = h_ptr + (module_slice.to(tl.int64) * tokens + token) * R
        slot = tl.load(token_slot_ptr + token)
        if slot < 0:
            # Never read: the scratch of a base-model row may hold anything, NaN included.
            tl.store(h_row + column, tl.zeros((BLOCK_R,), dtype=tl.float32), mask=column < R)
            return
        h = tl.load(h_row + column, mask=column < R, other=0.0)
        # In place: every warp must hold the whole row before any warp stores a part of it.
        tl.debug_barrier()
        scaling = sigma_ptr + slot.to(tl.int64) * sigma_slot_stride + module_slice * sigma_slice_stride
        for first_row in range(0, BLOCK_R, ROWS):
            row = first_row + tl.arange(0, ROWS)
            inside = (row < R)[:, None] & (column < R)[None, :]
            tile = tl.load(scaling + row[:, None] * R + column[None, :], mask=inside, other=0.0)
            # Widened before any arithmetic: products of bf16 or fp16 are not exact in their own type.
            scaled = tl.sum(tile.to(tl.float32) * h[None, :], axis=1)
            tl.store(h_row + row, scaled, mask=row < R)

    @triton.jit(do_not_specialize=["tokens"])
    def sigma_diag_kernel(  # type: ignore[no-untyped-def]
        h_ptr,
        sigma_ptr,
        token_slot_ptr,
        tokens,
        sigma_slot_stride,
        sigma_slice_stride,
        R: tl.constexpr,
        BLOCK_R: tl.constexpr,
        TOKENS: tl.constexpr,
    ):
        """h [slices, T, R] fp32, Σ [slots, slices, R] with dense [R]; grid (cdiv(T, TOKENS), slices)."""
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        module_slice = tl.program_id(1)
        column = tl.arange(0, BLOCK_R)
        slot = tl.load(token_slot_ptr + token, mask=token < tokens, other=-1)
        inside = (token < tokens)[:, None] & (column < R)[None, :]
        live = (slot >= 0)[:, None] & (column < R)[None, :]
        h_row = h_ptr + (module_slice.to(tl.int64) * tokens + token)[:, None] * R + column[None, :]
        h = tl.load(h_row, mask=live, other=0.0)
        scaling = sigma_ptr + slot.to(tl.int64) * sigma_slot_stride + module_slice * sigma_slice_stride
        diagonal = tl.load(scaling[:, None] + column[None, :], mask=live, other=0.0)
        tl.store(h_row, h * diagonal.to(tl.float32), mask=inside)


def jd_sigma_(h: torch.Tensor, sigma: torch.Tensor, token_slot: torch.Tensor, no_lora: torch.Tensor) -> None:
    """``h[i, t] ← Σ[s(t), i] · h[i, t]`` (the middle factor of arXiv 2407.00066, eq. 1), in place.

    Under torch.compile call ``torch.ops.vllm_jdlora.sigma_``, the same function as an opaque op.

    Args:
        h: fp32 [slices, T, R], contiguous; the result of the shrink.
        sigma: bf16, fp16 or fp32 [slots, slices, R, R] (JD-Full) or [slots, slices, R] (JD-Diag); may be a view of
            a wider buffer in its first two axes.
        token_slot: int32 [≥ T], scaling slot of each token; −1 sets the row to zeros.
        no_lora: bool [1] on the CPU; True leaves ``h`` as it is, because no token of the batch has an adapter. A
            tensor, because Dynamo would make a constant of a Python bool.

    Raises:
        JDLoRAError: shapes, dtypes or strides are not as above, or there is no Triton, or ``h`` lies on the CPU.
    """
    if no_lora.item() or h.numel() == 0:
        return
    _require_runnable(h)
    _require_layout(h, sigma, token_slot)
    slices, tokens, rank = h.shape
    launch = Launch.for_rank(rank)
    if sigma.ndim == 4:
        sigma_full_kernel[(tokens, slices)](
            h,
            sigma,
            token_slot,
            tokens,
            sigma.stride(0),
            sigma.stride(1),
            R=rank,
            BLOCK_R=launch.block_r,
            ROWS=launch.rows,
            num_warps=launch.num_warps,
            num_stages=1,
        )
    else:
        sigma_diag_kernel[(triton.cdiv(tokens, _DIAG_TOKENS), slices)](
            h,
            sigma,
            token_slot,
            tokens,
            sigma.stride(0),
            sigma.stride(1),
            R=rank,
            BLOCK_R=launch.block_r,
            TOKENS=_DIAG_TOKENS,
            num_warps=launch.num_warps,
            num_stages=1,
        )


def _require_runnable(h: torch.Tensor) -> None:
    """A GPU tensor and Triton, or Triton's interpreter (TRITON_INTERPRET=1 before this module's import)."""
    if triton is None:
        raise JDLoRAError("the Triton Σ kernel was called but Triton is not installed: install vllm-jdlora[cuda]")
    if h.device.type == "cpu" and isinstance(sigma_full_kernel, triton.JITFunction):
        raise JDLoRAError("the Triton Σ kernel was called with CPU tensors: use vllm_jdlora.kernels.cpu_grouped there")


def _require_layout(h: torch.Tensor, sigma: torch.Tensor, token_slot: torch.Tensor) -> None:
    if h.ndim != 3 or h.dtype != torch.float32 or not h.is_contiguous():
        raise JDLoRAError(f"h must be contiguous fp32 [slices, T, R], got {h.dtype} {list(h.shape)} {h.stride()}")
    slices, tokens, rank = h.shape
    if sigma.shape[1:] not in ((slices, rank, rank), (slices, rank)):
        raise JDLoRAError(
            f"sigma {list(sigma.shape)} does not fit h {list(h.shape)}: want [slots, slices, R, R] or [.., R]"
        )
    if sigma.stride()[2:] not in ((rank, 1), (1,)):
        raise JDLoRAError(f"each scaling matrix must be dense row by row, got strides {sigma.stride()}")
    if sigma.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise JDLoRAError(f"sigma must be bf16, fp16 or fp32, got {sigma.dtype}")
    if token_slot.dtype != torch.int32 or token_slot.ndim != 1 or token_slot.numel() < tokens:
        raise JDLoRAError(
            f"token_slot must be int32 [{tokens}] or longer, got {token_slot.dtype} {list(token_slot.shape)}"
        )


def _fake_sigma_(h: torch.Tensor, sigma: torch.Tensor, token_slot: torch.Tensor, no_lora: torch.Tensor) -> None:
    """What torch.compile sees: ``h`` is mutated, nothing is returned."""


# torch.library.custom_op would add tens of microseconds of Python to each of hundreds of calls in an eager step.
_library = torch.library.Library("vllm_jdlora", "FRAGMENT")
_library.define("sigma_(Tensor(a!) h, Tensor sigma, Tensor token_slot, Tensor no_lora) -> ()")
_library.impl("sigma_", jd_sigma_, "CUDA")
_library.impl("sigma_", jd_sigma_, "CPU")  # for the interpreter; otherwise it raises
_library._register_fake("sigma_", _fake_sigma_)
