"""How the CPU kernel's bases lie in memory, and what of this processor multiplies them."""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding
import torch

BLOCK = 4
"""Rows of V that lie side by side, step by step of d_in."""


@dataclass(frozen=True)
class Form:
    """How bases lie in memory, and what multiplies them.

    Attributes:
        stored: dtype of U and V, x and y.
        pairs: products of bf16 pairs, summed in fp32 (x and Σ h in bf16); else in fp32.
        lanes: fp32 numbers of a vector.
    """

    stored: torch.dtype
    pairs: bool
    lanes: int

    @classmethod
    def here(cls, dtype: torch.dtype) -> Form:
        """For a model in bf16 or fp32 on this machine. Raises ValueError for other dtypes."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"the CPU kernel stores bases in bf16 or fp32, not in {dtype}")
        features = llvmlite.binding.get_host_cpu_features()
        wide = features.get("avx512f", False) and features.get("avx512bw", False)
        return cls(dtype, dtype == torch.bfloat16 and wide and features.get("avx512bf16", False), 16 if wide else 8)

    @property
    def step(self) -> int:
        """Numbers of d_in that a turn of shrink takes: x and V are padded to a multiple."""
        return self.lanes * (2 if self.pairs else 1)

    @property
    def vector_bytes(self) -> int:
        """Bytes of a basis that a product reads at once."""
        return self.step * (2 if self.stored == torch.bfloat16 else 4)

    def rows(self, tokens: int) -> int:
        """Rows of V beside so many tokens, up to 4: no more sums than a vector has lanes, and a power of two."""
        return self.lanes // (1, 2, 4, 4)[tokens - 1]

    @property
    def vectors(self) -> int:
        """Vectors of outputs of a wide tile of expand: with four tokens, sums for half of the registers."""
        return self.lanes // 4


def lay_v(form: Form, v: torch.Tensor, out: torch.Tensor) -> None:
    """V [rows, d_in] as shrink reads it, in one stream: out [rows / 4, turns, 4, step], zeros where V has nothing."""
    blocks, turns, _, step = out.shape
    full = torch.zeros(blocks * BLOCK, turns * step, dtype=form.stored)
    full[: v.shape[0], : v.shape[1]] = v
    out.copy_(full.view(blocks, BLOCK, turns, step).transpose(1, 2))


def lay_u(form: Form, u: torch.Tensor, out: torch.Tensor) -> None:
    """U [d_out, R] as expand reads it: out [d_out / lanes, R / each, lanes, each], with pairs of r (2) or each (1)."""
    blocks, turns, lanes, each = out.shape
    full = torch.zeros(blocks * lanes, turns * each, dtype=form.stored)
    full[: u.shape[0]] = u
    out.copy_(full.view(blocks, lanes, turns, each).transpose(1, 2))
