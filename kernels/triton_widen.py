"""Bases of 8 bits become numbers of 16 bits in registers: exactly, and in one way on every GPU and in the interpreter.

sm_80 has no instruction for fp8, and GPUs convert integers at a quarter of the rate of other instructions; so the bits
of an fp16 number are put together instead. All results lie within ±2: what is left of a direction's scale is about the
largest number of the direction, which fp16 holds.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU installations have no Triton
    triton = None

WIDE, INT8, FP8 = 0, 1, 2
STORED = {torch.int8: INT8, torch.float8_e4m3fn: FP8}
UNIT = {torch.int8: 128.0, torch.float8_e4m3fn: 256.0}
"""What a stored number is divided by; the table of scales makes up for it."""


if triton is not None:

    @triton.jit
    def widened(stored, KIND: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
        """int8 (or the bits of fp8 e4m3) divided by its ``UNIT`` as fp16 or bf16."""
        bits = stored.to(tl.int16)
        if KIND == 1:
            # 8 + (q + 128) / 128: in [8, 16) the last place of fp16 is 1/128.
            half = ((bits & 0xFF) ^ 0x4880).to(tl.float16, bitcast=True) - 9.0
        else:
            # Sign, four bits of exponent, three of mantissa into fp16's places, whose exponents count from 8 lower.
            half = ((bits << 7) & -0x4080).to(tl.float16, bitcast=True)
        if dtype == tl.float16:
            return half
        else:
            return half.to(tl.float32).to(dtype)  # exact: at most 8 significant bits

else:
    widened = None  # who imports it says what to install
