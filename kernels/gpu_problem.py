"""One packed module with random bases, scalings and inputs, and steps on it: for the tests, ``gpu_check.py`` and its
benchmark. Needs torch and triton only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_jdlora.kernels.eight_bit_bases import WidenedBases
from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.token_tiles import TokenTiles
from vllm_jdlora.kernels.triton_grouped import GroupedLoRA

_SPARE_TOKENS = 3  # the plan may be made for more tokens than a step has
_OTHER_SLICES = 2  # Σ is a view of a buffer of all modules


@dataclass
class Problem:
    """One packed module and room for steps on it.

    Attributes:
        u: for each slice [clusters, d_out, R], on the CPU; in fp32 where the device has 8 bits and scales.
        v: for each slice [clusters, R, d_in], likewise.
        sigma: [slots, slices, R, R] or [slots, slices, R], a view.
        x: [T, d_in].
        y: [T, sum of d_out], what adapters are added to.
        cluster: of each of the T tokens in the last step; −1 for the base model and padding.
        slot: likewise.
    """

    kernels: GroupedLoRA
    module: PackedModule
    u: list[torch.Tensor]
    v: list[torch.Tensor]
    sigma: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    cluster: list[int] = field(default_factory=list)
    slot: list[int] = field(default_factory=list)

    def step(self, slots: Sequence[int] | np.ndarray, clusters: int | None = None) -> None:
        """Plan tokens with these slots, fewer than T leave padding behind them.

        Args:
            slots: of each token; −1 is the base model.
            clusters: adapter s lies in cluster s mod ``clusters``; None: in any of the module's.
        """
        slot = np.asarray(slots, dtype=np.int64)
        cluster = np.where(slot < 0, -1, slot % (clusters or self.module.clusters))
        self.kernels.tiles.plan(cluster, slot)
        padding = [-1] * (len(self.x) - len(slot))
        self.cluster, self.slot = cluster.tolist() + padding, slot.tolist() + padding

    @property
    def base_rows(self) -> torch.Tensor:
        """bool [T]: the rows of y that must keep their bits."""
        return torch.tensor(self.slot) < 0

    def run_(self, y: torch.Tensor) -> torch.Tensor:
        self.kernels.linear_(y, self.x, self.module, self.sigma)
        return y


def make_problem(
    d_in: int,
    widths: Sequence[int],
    *,
    rank: int,
    clusters: int,
    slots: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool = False,
    diagonal: bool = False,
    sigma_dtype: torch.dtype | None = None,
    eight_bit: torch.dtype | None = None,
    dense: bool | None = None,
) -> Problem:
    """Seeded random numbers of the size of activations; the scratch is full of NaN.

    Args:
        d_in: of the module.
        widths: d_out of each slice.
        rank: R.
        clusters: K.
        slots: scalings.
        tokens: T, padded.
        dtype: fp16 or bf16.
        device: a GPU, or the CPU for Triton's interpreter.
        batch_invariant: as :class:`GroupedLoRA` takes it.
        diagonal: Σ of JD-Diag.
        sigma_dtype: of Σ; None: ``dtype``.
        eight_bit: int8 or fp8 e4m3 for the K clusters; two of 16 bits follow, as of plain adapters.
        dense: as :class:`GroupedLoRA` takes it.
    """
    g = torch.Generator(device).manual_seed(rank * 1000 + tokens)

    def rand(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    wide = clusters if eight_bit is None else 2
    v = [rand(wide, 1, rank, d_in, scale=d_in**-0.5) for _ in widths]
    u = [rand(wide, 1, width, rank, scale=rank**-0.5) for width in widths]
    all_v, all_u = [s[:, 0].cpu() for s in v], [s[:, 0].cpu() for s in u]
    bases = None
    if eight_bit is not None:
        bases = WidenedBases.beside(v, u, clusters, eight_bit)
        for i in range(len(widths)):
            # Each direction has a scale of its own, and a tenth of int8's numbers lies at the end of its range.
            for stack in (bases.v[i], bases.u[i]):
                stored = rand(*stack.shape, scale=76.0, dtype=torch.float32).clamp(-127, 127)
                stack.copy_(stored.round() if eight_bit == torch.int8 else stored)
            v_scale = (rand(clusters, rank, dtype=torch.float32).abs() + 0.5) / 76 / d_in**0.5
            u_scale = (rand(clusters, rank, dtype=torch.float32).abs() + 0.5) / 76 / rank**0.5
            for cluster in range(clusters):
                bases.set_scales(cluster, i, v_scale[cluster], u_scale[cluster])
            all_v[i] = torch.cat([(bases.v[i][:, 0].float() * v_scale[:, :, None]).cpu(), all_v[i].float()])
            all_u[i] = torch.cat([(bases.u[i][:, 0].float() * u_scale[:, None, :]).cpu(), all_u[i].float()])
    matrix = (rank,) if diagonal else (rank, rank)
    worker_wide = rand(slots, len(widths) + _OTHER_SLICES, *matrix, scale=1.0 if diagonal else rank**-0.5)
    sigma = worker_wide.to(sigma_dtype or dtype)[:, 1 : 1 + len(widths)]
    module = PackedModule.of(v, u, bases)
    tiles = TokenTiles(tokens + _SPARE_TOKENS, module.clusters, device)
    kernels = GroupedLoRA(tiles, device, batch_invariant, dense=dense)
    kernels.reserve(module)
    kernels.spoil_scratch()
    x, y = rand(tokens, d_in), rand(tokens, sum(widths))
    return Problem(kernels, module, all_u, all_v, sigma, x, y)
