"""The clusters of a packed module in 8 bits, with a scale for each direction, beside its 16-bit plain adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.triton_widen import STORED, UNIT

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11


@dataclass(frozen=True)
class EightBitBases:
    """Buffers on the device that others fill and never move.

    A scale is applied in fp32: of V to the sums of the shrink, of U to Σ V x before it is rounded for the expand.

    Attributes:
        v: for each slice int8 or fp8 (e4m3) [clusters, 1, R′, d_in].
        u: for each slice [clusters, 1, d_out, R], dtype of V.
        v_scale: fp32 [clusters, slices, R′].
        u_scale: fp32 [clusters, slices, R].
    """

    v: tuple[torch.Tensor, ...]
    u: tuple[torch.Tensor, ...]
    v_scale: torch.Tensor
    u_scale: torch.Tensor

    @classmethod
    def beside(cls, v: Sequence[torch.Tensor], u: Sequence[torch.Tensor], clusters: int, dtype: torch.dtype) -> Self:
        """Zeros for ``clusters`` clusters of the shapes that the 16-bit stacks v and u have.

        Raises:
            JDLoRAError: ``dtype`` is neither int8 nor fp8 e4m3.
        """
        if dtype not in STORED:
            raise JDLoRAError(f"bases of 8 bits are int8 or float8_e4m3fn, not {dtype}")

        def room(stack: torch.Tensor) -> torch.Tensor:
            shape = (clusters, *stack.shape[1:])
            return torch.zeros(shape, dtype=torch.int8, device=stack.device).view(dtype)

        def scales(rank: int) -> torch.Tensor:
            return torch.zeros(clusters, len(v), rank, device=v[0].device)

        return cls(tuple(map(room, v)), tuple(map(room, u)), scales(v[0].shape[2]), scales(u[0].shape[3]))

    @property
    def clusters(self) -> int:
        return self.v[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.v[0].dtype

    def set_scales(self, cluster: int, module_slice: int, v_scale: torch.Tensor, u_scale: torch.Tensor) -> None:
        """Take the scales of one cluster in one slice.

        Args:
            cluster: row of the buffers.
            module_slice: which slice.
            v_scale: fp32 [r], r ≤ R′: V is the stored V times it, row by row; rows behind r stay 0.
            u_scale: fp32 [r], r ≤ R: of the columns of U.
        """
        self.v_scale[cluster, module_slice, : len(v_scale)] = v_scale
        self.u_scale[cluster, module_slice, : len(u_scale)] = u_scale


class WidenedBases(EightBitBases):
    """For the Triton kernels, which take a stored number divided by its ``UNIT``, as fp16 and bf16 hold it exactly.

    The scales in its buffers are those of a collection times ``UNIT``: about the largest number of a direction.
    """

    @property
    def stored(self) -> int:
        """The kind of number, as the kernels name it."""
        return STORED[self.dtype]

    def set_scales(self, cluster: int, module_slice: int, v_scale: torch.Tensor, u_scale: torch.Tensor) -> None:
        unit = UNIT[self.dtype]
        super().set_scales(cluster, module_slice, v_scale * unit, u_scale * unit)
