"""One packed module's bases as the Triton kernels want them: addresses, widths and columns in tables on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.eight_bit_bases import WidenedBases

BLOCK_COLUMNS = 128
"""Columns of y that one program of the expand writes."""


@dataclass(frozen=True)
class PackedModule:
    """The bases of a module of one or more slices, over buffers that others fill and never move.

    Clusters count from 0 through those of 8 bits, if there are any, and on through v and u.

    Attributes:
        v: for each slice V [clusters, 1, R′, d_in]; R′ is R, or a shard of it where tensor parallelism splits ranks.
        u: for each slice U [clusters, 1, d_out, R].
        eight_bit: the clusters that are kept in 8 bits.
        v_pointers: int64 [slices], the address of each slice's V; behind them those of 8 bits.
        u_pointers: int64 [slices], the address of each slice's U; behind them those of 8 bits.
        columns: int32 [column tiles, 4]: slice, first column in it, its width, its first column in y.
        hint: what all widths and columns are multiples of, at most 16; with 16, loads may be 16 bytes wide.
    """

    v: tuple[torch.Tensor, ...]
    u: tuple[torch.Tensor, ...]
    eight_bit: WidenedBases | None
    v_pointers: torch.Tensor
    u_pointers: torch.Tensor
    columns: torch.Tensor
    hint: int
    clusters: int
    slices: int
    v_rank: int
    rank: int
    d_in: int
    v_cluster_stride: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, v: Sequence[torch.Tensor], u: Sequence[torch.Tensor], eight_bit: WidenedBases | None = None
    ) -> PackedModule:
        """
        Args:
            v: for each slice V [clusters, 1, R′, d_in].
            u: for each slice U [clusters, 1, d_out, R].
            eight_bit: clusters before those of v and u; ``WidenedBases.beside`` them.

        Raises:
            JDLoRAError: stacks that the kernels cannot read: other dtypes than fp16 and bf16, slices that differ in
                clusters, rank or input, matrices that are not dense.
        """
        first_v, first_u = v[0], u[0]
        if first_v.dtype not in (torch.float16, torch.bfloat16):
            raise JDLoRAError(f"bases on a GPU are fp16 or bf16, not {first_v.dtype}: set --lora-dtype")
        for name, stacks in (("V", v), ("U", u)):
            for stack in stacks:
                dense = stack.stride()[2:] == (stack.shape[3], 1)
                if not dense or stack.dtype != first_v.dtype or stack.shape[1] != 1 or stack.data_ptr() % 16:
                    raise JDLoRAError(
                        f"{name} must be {first_v.dtype} [clusters, 1, rows, columns], dense and aligned, got "
                        f"{stack.dtype} {list(stack.shape)} {stack.stride()}"
                    )
        if len({(s.shape, s.stride()) for s in v}) > 1 or len({(s.shape[0], s.shape[3]) for s in u}) > 1:
            raise JDLoRAError("the slices of a packed module must have one rank, one input and equal clusters")
        if len(v) != len(u) or first_v.shape[0] != first_u.shape[0]:
            raise JDLoRAError(f"{len(v)} slices of V with {len(u)} of U, or other clusters")
        if any(s.stride(0) != s.shape[2] * s.shape[3] for s in u):
            raise JDLoRAError("the clusters of U must follow one another without gaps")
        if eight_bit is not None and [s.shape[1:] for s in (*eight_bit.v, *eight_bit.u)] != [
            s.shape[1:] for s in (*v, *u)
        ]:
            raise JDLoRAError("bases of 8 bits must have the shapes of the 16-bit ones beside them")
        device = first_v.device
        all_v, all_u = [*v, *(eight_bit.v if eight_bit else ())], [*u, *(eight_bit.u if eight_bit else ())]
        widths = [s.shape[2] for s in u]
        starts = [sum(widths[:i]) for i in range(len(widths))]
        columns = [
            (i, first, width, start)
            for i, (width, start) in enumerate(zip(widths, starts, strict=True))
            for first in range(0, width, BLOCK_COLUMNS)
        ]
        return cls(
            v=tuple(v),
            u=tuple(u),
            eight_bit=eight_bit,
            v_pointers=torch.tensor([s.data_ptr() for s in all_v], dtype=torch.int64, device=device),
            u_pointers=torch.tensor([s.data_ptr() for s in all_u], dtype=torch.int64, device=device),
            columns=torch.tensor(columns, dtype=torch.int32, device=device),
            hint=math.gcd(16, *widths, *starts),
            clusters=first_v.shape[0] + (eight_bit.clusters if eight_bit else 0),
            slices=len(v),
            v_rank=first_v.shape[2],
            rank=first_u.shape[3],
            d_in=first_v.shape[3],
            v_cluster_stride=first_v.stride(0),
            dtype=first_v.dtype,
        )
