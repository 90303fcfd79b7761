"""The activation metric of one slice: errors weighted by the second moment of the module's input.

min Σ_i w_i E_x‖(ΔW_i − UΣ_iV)x‖² = Σ_i w_i‖(ΔW_i − UΣ_iV) L‖_F² with C = E[xxᵀ] = LLᵀ: plain JD of the adapters
with A_i L in the place of A_i (weighted low rank approximation as in ASVD and SVD-LLM, for many matrices at once).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import SliceProblem

RIDGE = 1e-3
"""Share of the mean input energy added to each direction: what calibration text never showed still counts a little."""
# A direction with less than this share of the strongest one's energy is the padding of a smaller effective rank.
_PADDING = 1e-12


@dataclass(frozen=True)
class InputMetric:
    """C = E[xxᵀ] of a slice's input as its Cholesky factor: ‖M‖_C² = ‖M L‖_F²."""

    root: Tensor  # L [d_in, d_in] fp64, lower triangular

    @staticmethod
    def of(second_moment: Tensor, name: str, ridge: float = RIDGE) -> InputMetric:
        """C [d_in, d_in] symmetric, positive semi-definite, any scale (only directions' ratios count).

        ridge: share of tr(C)/d_in that is added to the diagonal. Raises JDLoRAError if C is not such a matrix.
        """
        if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
            raise JDLoRAError(f"slice {name}: a second moment of shape {list(second_moment.shape)}, not [d_in, d_in]")
        c = second_moment.double()
        mean = c.diagonal().mean()
        if not bool(c.isfinite().all()) or float(mean) <= 0:
            raise JDLoRAError(f"slice {name}: the second moment of its input is zero or not finite: calibrate again")
        c = (c + c.T) / (2 * mean)
        c.diagonal().add_(ridge)
        root, failed = torch.linalg.cholesky_ex(c)
        if int(failed):
            raise JDLoRAError(f"slice {name}: the second moment of its input has negative directions: calibrate again")
        return InputMetric(root)

    def whitened(self, v: Tensor) -> Tensor:
        """v L for rows v [..., d_in], in the dtype of v."""
        return v @ self.root.to(v)

    def applied_to(self, problem: SliceProblem) -> SliceProblem:
        """The same adapters in whitened coordinates: A_i L, each of unit norm in this metric."""
        whitened = problem.with_stacks(problem.bt, self.whitened(problem.a))
        norms = whitened.stacked_squared_norms().clamp_min(torch.finfo(torch.float64).tiny)
        return replace(whitened, weights=1 / norms)

    def lifted(self, problem: SliceProblem, whitened: SliceProblem, u: Tensor, v: Tensor) -> Tensor:
        """V [R, d_in] with V L = v for bases u [d_out, R], v [R, d_in] fitted to `whitened`, problem in this metric.

        Inversion-free, so a C without full rank does no harm: v lies in the span of the rows A_i L, and one more
        half-sweep gives the combination of rows of A_i (COALA, arXiv 2507.07580, does the same for one matrix).
        In the gauge of `fit_full` the half-sweep maps each direction to its energy times itself.
        """
        z, t = whitened.times(u.to(whitened.bt.dtype), v.to(whitened.a.dtype).T)
        columns = (problem.a.T @ whitened.through_own(z, t)).double()  # [d_in, R]
        reached = self.root.T @ columns
        energy = (v.double().T * reached).sum(0)
        present = energy > _PADDING * energy.max().clamp_min(torch.finfo(torch.float64).tiny)
        scale = torch.where(present, 1 / energy.where(present, torch.ones_like(energy)), 0.0)
        columns, reached = columns * scale, reached * scale
        rotation = torch.linalg.lstsq(reached[:, present], v.double().T[:, present]).solution
        lifted = torch.zeros_like(columns)
        lifted[:, present] = columns[:, present] @ rotation
        return lifted.T.contiguous().to(v.dtype)
