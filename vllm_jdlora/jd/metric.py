"""The metric of one slice: errors weighted by the module's inputs, and by the loss's curvature at its outputs.

min Σ_i w_i‖L_Gᵀ (ΔW_i − UΣ_iV) L_C‖_F² with C = E[xxᵀ] = L_C L_Cᵀ of the inputs and G = E[ggᵀ] = L_G L_Gᵀ of the loss's
gradients at the outputs: plain JD of the adapters with A_i L_C in the place of A_i and L_Gᵀ B_i in that of B_i.

With C alone this is the output error E_x‖(ΔW_i − UΣ_iV)x‖² (weighted low rank approximation as in ASVD and SVD-LLM, for
many matrices at once). With both it is, to second order and with x and g taken as independent, how much the loss rises:
the Kronecker-factored Fisher information (K-FAC, Martens & Grosse, arXiv 1503.05671).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import SliceProblem

RIDGE = 1e-3
"""Share of the mean energy added to each direction: what calibration text never showed still counts a little."""
# A direction with less than this share of the strongest one's energy is the padding of a smaller effective rank.
_PADDING = 1e-12
# Bases that one more half-sweep spans to this share of their size are lifted by it. Those of JD-Full at a fixed point
# are; JD-Diag's columns need not be, and get the inverse.
_IN_SPAN = 1e-3


@dataclass(frozen=True)
class SliceMetric:
    """C of a slice's input and, where the loss counts, G of its output's gradients, as Cholesky factors."""

    root_in: Tensor  # L_C [d_in, d_in] fp64, lower triangular
    root_out: Tensor | None = None  # L_G [d_out, d_out] fp64, lower triangular

    @staticmethod
    def of(second_moment: Tensor, name: str, ridge: float = RIDGE) -> SliceMetric:
        """C [d_in, d_in] symmetric, positive semi-definite, any scale (only directions' ratios count).

        ridge: share of the mean diagonal that is added to it. Raises JDLoRAError if C is not such a matrix.
        """
        return SliceMetric(_root(second_moment, f"slice {name}: the second moment of its input", ridge))

    def with_gradients(self, second_moment: Tensor, name: str, ridge: float = RIDGE) -> SliceMetric:
        """The same with G [d_out, d_out] of the gradients; arguments and errors as in `of`."""
        return replace(self, root_out=_root(second_moment, f"slice {name}: the second moment of its gradients", ridge))

    @property
    def absolute(self) -> bool:
        """With gradients errors are losses: an adapter that changes the loss more counts more (`mean_energies`)."""
        return self.root_out is not None

    def whitened(self, v: Tensor) -> Tensor:
        """v L_C for rows v [..., d_in], in the dtype of v."""
        return v @ self.root_in.to(v)

    def whitened_out(self, u: Tensor) -> Tensor:
        """L_Gᵀ u for columns u [d_out, ...], in the dtype of u; u itself without gradients."""
        return u if self.root_out is None else self.root_out.to(u).T @ u

    def applied_to(self, problem: SliceProblem) -> SliceProblem:
        """The same adapters in whitened coordinates: L_Gᵀ B_i and A_i L_C, each of unit norm in this metric."""
        bt = problem.bt if self.root_out is None else problem.bt @ self.root_out.to(problem.bt)
        whitened = problem.with_stacks(bt, self.whitened(problem.a))
        norms = whitened.stacked_squared_norms().clamp_min(torch.finfo(torch.float64).tiny)
        return replace(whitened, weights=problem.importance / norms)

    def lifted(self, problem: SliceProblem, whitened: SliceProblem, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(U [d_out, R], V [R, d_in]) with L_Gᵀ U = u and V L_C = v for bases u, v fitted to `whitened`.

        whitened: what `applied_to` made of the problem. Inversion-free, so a C or G without full rank does no harm: v
        lies in the span of the rows A_i L_C, and one more half-sweep gives the combination of rows of A_i (COALA, arXiv
        2507.07580, does the same for one matrix); so does u in that of the columns of B_i. In the gauge of `fit_full`
        the half-sweep maps each direction to its energy times itself.
        """
        z, t = whitened.times(u.to(whitened.bt.dtype), v.to(whitened.a.dtype).T)
        columns = problem.a.T @ whitened.through_own(z, t)
        lifted_v = _combined(columns.double(), self.root_in, v.double().T).T.contiguous().to(v.dtype)
        if self.root_out is None:
            return u, lifted_v
        columns = problem.bt.T @ whitened.through_own(t, z)
        return _combined(columns.double(), self.root_out, u.double()).to(u.dtype), lifted_v


def _root(second_moment: Tensor, what: str, ridge: float) -> Tensor:
    """Cholesky factor [d, d] fp64 of a second moment scaled to a mean diagonal of 1, and the ridge."""
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise JDLoRAError(f"{what} has the shape {list(second_moment.shape)}, not a square one")
    c = second_moment.double()
    mean = c.diagonal().mean()
    if not bool(c.isfinite().all()) or float(mean) <= 0:
        raise JDLoRAError(f"{what} is zero or not finite: calibrate again")
    c = (c + c.T) / (2 * mean)
    c.diagonal().add_(ridge)
    root, failed = torch.linalg.cholesky_ex(c)
    if int(failed):
        raise JDLoRAError(f"{what} has negative directions: calibrate again")
    return root


def _combined(columns: Tensor, root: Tensor, basis: Tensor) -> Tensor:
    """X [d, R] in the span of the columns [d, R] with rootᵀ X = basis, each column the energy times its direction."""
    reached = root.T @ columns
    energy = (basis * reached).sum(0)
    present = energy > _PADDING * energy.max().clamp_min(torch.finfo(torch.float64).tiny)
    scale = torch.where(present, 1 / energy.where(present, torch.ones_like(energy)), 0.0)
    columns, reached = columns * scale, reached * scale
    rotation = torch.linalg.lstsq(reached[:, present], basis[:, present]).solution
    lifted = torch.zeros_like(columns)
    lifted[:, present] = columns[:, present] @ rotation
    missed = (reached[:, present] @ rotation - basis[:, present]).norm()
    if float(missed) > _IN_SPAN * float(basis.norm()):
        return torch.linalg.solve_triangular(root.T, basis, upper=True)
    return lifted
