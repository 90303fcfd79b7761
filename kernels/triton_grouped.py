"""``y += U Σ V x`` for the tokens of a step on a GPU: which launches, of what sizes, over which scratch.

A step is planned once (``TokenTiles``); a layer only launches. Launches are a function of the padded token count and
of shapes: no allocation, no wait, nothing tuned while serving, so a layer may be captured in a CUDA graph and replayed
for other batches. By default three launches: the shrink stores parts, Σ adds them up and scales, the expand adds to y.
"""

from __future__ import annotations

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.packed_module import PackedModule
from vllm_jdlora.kernels.token_tiles import PREFILL_TOKENS, TokenTiles
from vllm_jdlora.kernels.triton_expand import jd_expand_
from vllm_jdlora.kernels.triton_shrink import Launch, jd_shrink_, most_part_rows, triton
from vllm_jdlora.kernels.triton_sigma import jd_sigma_


def fuses_scaling(tokens: int, rank: int, batch_invariant: bool) -> bool:
    """Whether Σ is applied in the expand, by the traffic model (``traffic.py``): small ranks or small batches.

    Each program of the expand reads its tokens' Σ again. Up to 128 tokens of R = 16, or 8 of R = 64, that costs less
    than a launch. Never where a row's bits must not depend on how many tokens the step has, nor where registers spill.
    """
    return not batch_invariant and rank <= 64 and tokens <= PREFILL_TOKENS and tokens * rank * rank <= 1 << 15


class GroupedLoRA:
    """What all layers of a model share on one GPU: the step's plan, the scratch, and how launches are chosen.

    Launches of all layers follow one another on one stream, so one scratch serves them all.
    """

    def __init__(
        self,
        tiles: TokenTiles,
        device: torch.device | str,
        batch_invariant: bool = False,
        *,
        dense: bool | None = None,
    ):
        """
        Args:
            tiles: the plan, filled by its owner before each step.
            device: a GPU; the CPU only under Triton's interpreter.
            batch_invariant: equal bits for a token whatever else is in its step.
            dense: whether every shrink takes the V of all clusters; None: where the traffic model says so.

        Raises:
            JDLoRAError: there is no Triton, or the device is the CPU and Triton is not interpreted.
        """
        _require_runnable(torch.device(device))
        self.tiles = tiles
        self._device, self._batch_invariant, self._dense = torch.device(device), batch_invariant, dense
        on_gpu = self._device.type == "cuda"
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 132
        self._part_rows = most_part_rows(tiles.capacity, self._multiprocessors, batch_invariant)
        self._h = torch.empty(0, dtype=torch.float32, device=device)
        self._g = torch.empty(0, dtype=torch.float32, device=device)

    def reserve(self, module: PackedModule) -> None:
        """Make room for a layer's step; for all layers before the first step, because graphs keep addresses."""
        h = self._part_rows * module.slices * module.v_rank
        g = self.tiles.capacity * module.slices * module.rank
        if h > self._h.numel():
            self._h = torch.empty(h, dtype=torch.float32, device=self._device)
        if g > self._g.numel():
            self._g = torch.empty(g, dtype=torch.float32, device=self._device)

    def spoil_scratch(self) -> None:
        """Fill the scratch with NaN, so that a kernel which reads what nothing has written gives itself away."""
        self._h.fill_(torch.nan)
        self._g.fill_(torch.nan)

    def linear_(
        self, y: torch.Tensor, x: torch.Tensor, module: PackedModule, sigma: torch.Tensor, add_inputs: bool = True
    ) -> None:
        """``y[t] += U[c(t)] · (Σ[s(t)] · (V[c(t)] · x[t]))`` (arXiv 2407.00066, eq. 1); other rows keep their bits.

        Args:
            y: fp16 or bf16 [T, sum of d_out], rows dense; T may exceed the plan's tokens (padding).
            x: [T, d_in], dtype of y.
            module: the layer's bases, dtype of y; reserved.
            sigma: bf16, fp16 or fp32 [slots, slices, R, R] (JD-Full) or [slots, slices, R] (JD-Diag), each Σ dense.
            add_inputs: False writes over the rows of y that have an adapter.

        Raises:
            JDLoRAError: x or y is of another layout, or the plan is for more tokens.
        """
        if not self._has_work(x, module.dtype):
            return
        _require_rows(y, module.dtype)
        tokens, rank, slices = x.shape[0], module.rank, module.slices
        launch = self._launch(tokens, module)
        jd_shrink_(self._h, x, module, self.tiles, launch)
        if fuses_scaling(tokens, rank, self._batch_invariant):
            source, scaling, parts = self._h, sigma, launch.parts
        else:
            source, scaling, parts = self._scaled(module), None, 1
            jd_sigma_(source, self._h, sigma, self.tiles, tokens=tokens, parts=launch.parts, slices=slices, rank=rank)
        jd_expand_(
            y, source, scaling, module, self.tiles, tokens=tokens, rows=launch.rows, parts=parts, add_inputs=add_inputs
        )

    def shrink_(self, h: torch.Tensor, x: torch.Tensor, module: PackedModule) -> None:
        """``h[i, p] = V[c(p), i] · x[token(p)]`` for sorted rows p, where ranks are gathered before Σ.

        Args:
            h: fp32 [slices, T, R′], contiguous.
            x: fp16 or bf16 [T, d_in].
            module: the layer's bases.
        """
        if not self._has_work(x, module.dtype):
            return
        launch = self._launch(x.shape[0], module)
        jd_shrink_(self._h, x, module, self.tiles, launch)
        slices, tokens, rank = h.shape
        jd_sigma_(h, self._h, None, self.tiles, tokens=tokens, parts=launch.parts, slices=slices, rank=rank)

    def expand_(
        self,
        y: torch.Tensor,
        h: torch.Tensor,
        module: PackedModule,
        sigma: torch.Tensor,
        first_column: int = 0,
        add_inputs: bool = True,
    ) -> None:
        """``y[token(p)] += U[c(p), i] · Σ[s(p), i] · h[i, p]``: the rest of :meth:`linear_` after :meth:`shrink_`.

        Args:
            y: fp16 or bf16 [T, columns], rows dense.
            h: fp32 [slices, T, R], contiguous.
            module: the layer's bases.
            sigma: as for :meth:`linear_`.
            first_column: of y, for the first slice.
            add_inputs: False writes over y.
        """
        if not self.tiles.live:
            return
        _require_rows(y, module.dtype)
        slices, tokens, rank = h.shape
        launch = self._launch(tokens, module)
        g = self._scaled(module)
        jd_sigma_(g, h, sigma, self.tiles, tokens=tokens, parts=1, slices=slices, rank=rank)
        jd_expand_(
            y,
            g,
            None,
            module,
            self.tiles,
            tokens=tokens,
            rows=launch.rows,
            first_column=first_column,
            add_inputs=add_inputs,
        )

    def _launch(self, tokens: int, module: PackedModule) -> Launch:
        columns = module.slices * module.v_rank
        return Launch.of(
            tokens,
            self.tiles.clusters,
            columns,
            module.d_in,
            self._multiprocessors,
            self._batch_invariant,
            number_bytes=2 if module.eight_bit is None else 1,
            dense=self._dense,
        )

    def _scaled(self, module: PackedModule) -> torch.Tensor:
        """Room for Σ V x; in fp32 where the expand has yet to multiply it with scales, so that it is rounded once."""
        return self._g.view(module.dtype) if module.eight_bit is None else self._g

    def _has_work(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        # While a graph is captured this is the plan of the warm-up; a replay follows the tiles on the device.
        if not self.tiles.live:
            return False
        _require_rows(x, dtype)
        if x.shape[0] < self.tiles.tokens:
            raise JDLoRAError(f"the LoRA plan is for {self.tiles.tokens} tokens and the layer got {x.shape[0]}")
        return True


def _require_runnable(device: torch.device) -> None:
    """A GPU and Triton, or Triton's interpreter (TRITON_INTERPRET=1 before this module's import)."""
    if triton is None:
        raise JDLoRAError("the GPU kernels need Triton and it is not installed: install vllm-jdlora[cuda]")
    if device.type == "cpu":
        from vllm_jdlora.kernels.triton_shrink import shrink_kernel

        if isinstance(shrink_kernel, triton.JITFunction):
            raise JDLoRAError("the Triton kernels were asked for on the CPU: use vllm_jdlora.kernels.cpu_grouped there")


def _require_rows(rows: torch.Tensor, dtype: torch.dtype) -> None:
    if rows.ndim != 2 or rows.stride(1) != 1 or rows.dtype != dtype:
        raise JDLoRAError(
            f"the LoRA kernels take {dtype} [T, columns] with dense rows, got {rows.dtype} {list(rows.shape)} "
            f"{rows.stride()}"
        )
