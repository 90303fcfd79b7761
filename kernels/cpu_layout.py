"""How the CPU kernel's bases lie in memory, and what of this processor multiplies them."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding
import numpy as np
import torch

BLOCK = 4
"""Rows of V that lie side by side, step by step of d_in."""


@dataclass(frozen=True)
class Form:
    """How bases lie in memory, and what multiplies them.

    Attributes:
        stored: dtype of x and y, and of U and V but for those of 8 bits.
        pairs: products of bf16 pairs, summed in fp32 (x and Σ h in bf16); else in fp32.
        lanes: fp32 numbers of a vector.
        eight_bit: int8 or fp8 (e4m3) where U and V are in 8 bits, with a scale for each direction.
    """

    stored: torch.dtype
    pairs: bool
    lanes: int
    eight_bit: torch.dtype | None = None

    @classmethod
    def here(cls, dtype: torch.dtype, eight_bit: torch.dtype | None = None) -> Form:
        """For a model in bf16 or fp32 on this machine. Raises ValueError for other dtypes."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"the CPU kernel stores bases in bf16 or fp32, not in {dtype}")
        features = llvmlite.binding.get_host_cpu_features()
        wide = features.get("avx512f", False) and features.get("avx512bw", False)
        pairs = dtype == torch.bfloat16 and wide and features.get("avx512bf16", False)
        if eight_bit is not None:
            pairs = pairs and features.get("avx512vbmi", False)
        return cls(dtype, pairs, 16 if wide else 8, eight_bit)

    @property
    def basis(self) -> torch.dtype:
        """Dtype of the numbers of U and V."""
        return self.stored if self.eight_bit is None else self.eight_bit

    @property
    def looked_up(self) -> bool:
        """Whether U and V are laid down as sign and magnitude, which tables in registers make bf16 of."""
        return self.pairs and self.eight_bit is not None

    @property
    def step(self) -> int:
        """Numbers of d_in that a turn of shrink takes: x and V are padded to a multiple."""
        return self.lanes * (2 if self.pairs else 1)

    @property
    def vector_bytes(self) -> int:
        """Bytes of a basis that a product reads at once."""
        return self.step * self.basis.itemsize

    def rows(self, tokens: int) -> int:
        """Rows of V beside so many tokens, up to 4: no more sums than a vector has lanes, and a power of two."""
        return self.lanes // (1, 2, 4, 4)[tokens - 1]

    @property
    def vectors(self) -> int:
        """Vectors of outputs of a wide tile of expand: with four tokens, sums for half of the registers."""
        return self.lanes // 4


def magnitudes(eight_bit: torch.dtype) -> torch.Tensor:
    """What the lower 7 bits of a laid-down number stand for: fp32 [128], each of which bf16 holds."""
    if eight_bit == torch.int8:
        return torch.arange(128.0)
    return torch.arange(128, dtype=torch.uint8).view(eight_bit).float()


def byte_values(form: Form) -> np.ndarray:
    """fp32 [256] that the bytes of U and V stand for, as they are laid down."""
    assert form.eight_bit is not None
    if form.looked_up:
        positive = magnitudes(form.eight_bit)
        return torch.cat([positive, -positive]).numpy()
    return torch.arange(256, dtype=torch.uint8).view(form.eight_bit).float().numpy()


def lay_v(form: Form, v: torch.Tensor, out: torch.Tensor) -> None:
    """V [rows, d_in] as shrink reads it, in one stream: out [rows / 4, turns, 4, step], zeros where V has nothing."""
    blocks, turns, _, step = out.shape
    full = torch.zeros(blocks * BLOCK, turns * step, dtype=out.dtype)
    full[: v.shape[0], : v.shape[1]] = v
    _lay(form, full.view(blocks, BLOCK, turns, step).transpose(1, 2), out)


def lay_u(form: Form, u: torch.Tensor, out: torch.Tensor) -> None:
    """U [d_out, R] as expand reads it: out [d_out / lanes, R / each, lanes, each], with pairs of r (2) or each (1)."""
    blocks, turns, lanes, each = out.shape
    full = torch.zeros(blocks * lanes, turns * each, dtype=out.dtype)
    full[: u.shape[0]] = u
    _lay(form, full.view(blocks, lanes, turns, each).transpose(1, 2), out)


def _lay(form: Form, numbers: torch.Tensor, out: torch.Tensor) -> None:
    if not form.looked_up:
        out.copy_(numbers)
        return
    if form.eight_bit == torch.int8:
        # The quantiser makes no −128.
        numbers = torch.where(numbers < 0, -128 - numbers.clamp(min=-127), numbers)
    # Of two vectors eight numbers each in turn, which is how instructions take bytes apart into words.
    two = numbers.reshape(-1, 2, form.step // 8, 8)
    out.copy_(two.transpose(1, 2).reshape(out.shape))
