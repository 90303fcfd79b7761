"""Conversions that numba lacks: an address as a pointer, bf16 as fp32 and back."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def address_as_pointer(context, address):  # type: ignore[no-untyped-def]
    """int64 → void *."""

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def widened(context, number):  # type: ignore[no-untyped-def]
    """bf16, as uint16, → fp32, exactly."""

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def bits_of(context, number):  # type: ignore[no-untyped-def]
    """fp32 → its bits, uint32."""

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@numba.njit(inline="always")
def narrowed(number: Any) -> Any:
    """fp32 → bf16, as uint16, to the nearest (even on ties); NaN stays one."""
    bits = bits_of(number)
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(0x40))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
