"""Bases in 8 bits: each direction of a basis as int8 or fp8 numbers with one scale (symmetric, round to nearest).

The paper names quantisation as its first future direction. Bases are nearly all of a collection's bytes while there
are few adapters for a cluster; Σ is refitted on the quantised bases, so that only their tilt is lost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""How each quantisation is stored."""


def quantized(directions: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Rows [..., R, d] in 8 bits, and their scales [..., R] fp32; zero rows have the scale 0.

    Quantising what `dequantized` gives back is exact: the largest number of a row keeps its place.
    """
    stored = STORED[kind]
    values = directions.float()
    scale = values.abs().amax(-1) / _LARGEST[stored]
    steps = values / scale.where(scale > 0, torch.ones_like(scale))[..., None]
    return (steps.round() if stored == torch.int8 else steps).to(stored), scale


def dequantized(stored: Tensor, scale: Tensor) -> Tensor:
    """Rows [..., R, d] in fp32."""
    return stored.float() * scale[..., None]


def cast_of(kind: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What becomes of the directions [R, d] of a basis when they are stored and read again."""
    if kind == "none":
        return lambda directions: directions.to(dtype)
    return lambda directions: dequantized(*quantized(directions, kind))
