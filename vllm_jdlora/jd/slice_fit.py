"""One visit of a slice: every cluster's bases fitted and cast, Σ refitted on the cast, exact errors, all energies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.diag import captured_diag, fit_diag, refit_diag
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.projection import captured_by_cluster, refit_sigma, squared_errors

Bases = tuple[Tensor, Tensor]
"""u [d_out, R] and v [R, d_in]."""


class Metric(Protocol):
    """Another inner product on the adapters of one slice, as coordinates in which it is the Frobenius one."""

    @property
    def absolute(self) -> bool:
        """Whether squared errors are of one unit for all adapters: losses."""

    def applied_to(self, problem: SliceProblem) -> SliceProblem:
        """The same adapters in whitened coordinates, each of unit norm in this metric."""

    def lifted(self, problem: SliceProblem, whitened: SliceProblem, u: Tensor, v: Tensor) -> Bases:
        """U and V for bases u, v that were fitted to `whitened`, what `applied_to` made of the problem."""

    def whitened(self, v: Tensor) -> Tensor:
        """Rows v [..., d_in] in whitened coordinates."""

    def whitened_out(self, u: Tensor) -> Tensor:
        """Columns u [d_out, ...] in whitened coordinates."""


@dataclass(frozen=True)
class Method:
    """How one cluster is fitted, its Σ refitted on given bases, and the energy that bases capture of any adapter."""

    fit: Callable[[SliceProblem, int, Bases | None, int], Bases]  # problem, rank, warm start, most sweeps
    refit: Callable[[SliceProblem, Tensor, Tensor], tuple[Tensor, Tensor]]  # problem, u, v -> Σ, squared errors
    captured: Callable[
        [SliceProblem, Tensor, Tensor], Tensor
    ]  # problem, u [K, …], v [K, …] -> [m, K] of the importance


def _fit_full(problem: SliceProblem, rank: int, start: Bases | None, max_sweeps: int) -> Bases:
    fit = fit_full(problem, rank, start=start, max_sweeps=max_sweeps)
    return fit.u, fit.v


def _fit_diag(problem: SliceProblem, rank: int, start: Bases | None, max_sweeps: int) -> Bases:
    fit = fit_diag(problem, rank)  # has starts of its own, and needs many more sweeps
    return fit.u, fit.v


METHODS: Mapping[str, Method] = {
    "full": Method(_fit_full, refit_sigma, captured_by_cluster),
    "diag": Method(_fit_diag, refit_diag, captured_diag),
}


class ScalingOverflow(JDLoRAError):
    """The scaling matrices of the adapter at position `adapter` do not fit into the dtype they are stored in."""

    def __init__(self, adapter: int, dtype: torch.dtype):
        super().__init__(f"adapter {adapter}: its scaling matrices do not fit into {dtype}")
        self.adapter = adapter


@dataclass(frozen=True)
class SliceRecipe:
    """How a slice is fitted and what its values become when they are stored.

    cast: the directions [R, d] of a basis in fp32 → their values as stored (a cast to bf16, or quantised and back); Σ
    is refitted after it.
    max_sweeps: Gauss–Seidel sweeps of JD-Full in each fit.
    """

    rank: int
    method: str = "full"
    cast: Callable[[Tensor], Tensor] = torch.Tensor.float
    sigma_dtype: torch.dtype = torch.float32
    max_sweeps: int = 20

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise JDLoRAError(f"rank {self.rank}: give a rank of at least 1")
        if self.max_sweeps < 1:
            raise JDLoRAError(f"max_sweeps {self.max_sweeps}: give at least 1")
        if self.method not in METHODS:
            raise JDLoRAError(f"method {self.method!r} is not one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class SliceFit:
    """What one slice of a collection became: n adapters, K clusters, rank R; all on the CPU.

    Bases and Σ are values as stored, and the errors are exactly theirs. Zero where an adapter, or a whole cluster, has
    nothing. `captured` is that of the bases before the cast, by which adapters may move.
    """

    u: Tensor  # [K, d_out, R] as cast; columns beyond a cluster's effective rank are zero
    v: Tensor  # [K, R, d_in]
    sigma: Tensor  # [n, R, R] ([n, R] for JD-Diag) in its own cluster's bases, s and norm folded in
    squared_norm: Tensor  # [n] fp64, ‖ΔW‖_F²
    squared_error: Tensor  # [n] fp64, ‖ΔW − UΣV‖_F²
    captured: Tensor  # [n, K] fp64, what each cluster's bases hold of each adapter's importance, in the metric
    output_norm: Tensor | None = None  # [n] fp64, ‖ΔW‖² in the metric, where there is one
    output_error: Tensor | None = None  # [n] fp64, ‖ΔW − UΣV‖² in the metric

    def relative(self) -> Tensor:
        """[n] squared error over squared norm in the metric of the fit; 0 where the adapter has nothing."""
        norm, error = self.measures
        return error / norm.where(norm > 0, torch.ones_like(norm))

    def importance(self, energies: Tensor | None) -> Tensor:
        """[n] of the adapters in the fit, as `SliceProblem.in_shares_of` has it; 0 where the adapter has nothing."""
        norm, _ = self.measures
        share = (norm > 0).double()
        return share if energies is None else torch.where(energies > 0, norm / energies, share)

    @property
    def measures(self) -> tuple[Tensor, Tensor]:
        """(‖ΔW‖², ‖ΔW − UΣV‖²), each [n], in the metric of the fit."""
        if self.output_norm is not None and self.output_error is not None:
            return self.output_norm, self.output_error
        return self.squared_norm, self.squared_error


def fit_slice(
    problem: SliceProblem,
    cluster: Tensor,
    clusters: int,
    recipe: SliceRecipe,
    *,
    metric: Metric | None = None,
    energies: Tensor | None = None,
    before: SliceFit | None = None,
    changed: Sequence[int] = (),
) -> SliceFit:
    """Fit every cluster of the adapters with labels `cluster` [n], or, given the fit `before`, those in `changed`.

    Changed clusters start from the bases that they had; clusters that are not named keep theirs to the bit (their
    members must be the same). A cluster with no member in this slice gets zero bases. energies: [n] fp64, see
    `SliceProblem.in_shares_of`; without them every adapter counts as if of unit norm.
    Raises ScalingOverflow where Σ is beyond the range of its dtype.
    """
    method = METHODS[recipe.method]
    view = problem if metric is None else metric.applied_to(problem)
    if energies is not None:
        view = view.in_shares_of(energies)
    todo = list(range(clusters)) if before is None else list(changed)
    members, n = problem.members.cpu(), len(cluster)
    present = torch.zeros(n, dtype=torch.bool)
    present[members] = True
    us: list[Tensor] = [] if before is None else list(before.u)
    vs: list[Tensor] = [] if before is None else list(before.v)
    shape = (n, recipe.rank) if recipe.method == "diag" else (n, recipe.rank, recipe.rank)
    sigma = torch.zeros(shape, dtype=recipe.sigma_dtype) if before is None else before.sigma.clone()
    errors = _errors(n, before, metric)
    fitted_u = torch.zeros(len(todo), problem.bt.shape[1], recipe.rank, device=problem.bt.device)
    fitted_v = torch.zeros(len(todo), recipe.rank, view.a.shape[1], device=problem.bt.device)
    for row, k in enumerate(todo):
        positions = (cluster[members] == k).nonzero()[:, 0]
        own = view.subset(positions)
        plain = own if metric is None else problem.subset(positions)
        start = None if before is None else _start(before, k, metric)
        u, v = method.fit(own, recipe.rank, start, recipe.max_sweeps)
        fitted_u[row], fitted_v[row] = u, v
        lifted_u, lifted_v = (u, v) if metric is None else metric.lifted(plain, own, u, v)
        cast_u = recipe.cast(lifted_u.float().T).T.contiguous()
        cast_v = recipe.cast(lifted_v.float())
        seen_u, seen_v = seen(metric, cast_u, cast_v)
        stored = method.refit(own, seen_u, seen_v)[0].to(recipe.sigma_dtype)
        finite = stored.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ScalingOverflow(int(members[positions][int(finite.int().argmin())]), recipe.sigma_dtype)
        at = members[positions]
        sigma[at] = stored.cpu()
        errors[0][at] = squared_errors(plain, cast_u, stored, cast_v).cpu()
        if metric is not None:
            errors[1][at] = squared_errors(own, seen_u, stored, seen_v).cpu()
        if before is None:
            us.append(cast_u.cpu())
            vs.append(cast_v.cpu())
        else:
            us[k], vs[k] = cast_u.cpu(), cast_v.cpu()
    captured = torch.zeros(n, clusters, dtype=torch.float64) if before is None else before.captured.clone()
    captured[members[:, None], torch.tensor(todo, dtype=torch.int64)] = method.captured(view, fitted_u, fitted_v).cpu()
    norms = [torch.zeros(n, dtype=torch.float64) for _ in range(2)]
    for norm, adapters in zip(norms, (problem, view), strict=True):
        norm[members] = adapters.squared_norms.cpu()
    return SliceFit(
        u=torch.stack(us),
        v=torch.stack(vs),
        sigma=sigma,
        squared_norm=norms[0],
        squared_error=errors[0],
        captured=captured,
        output_norm=None if metric is None else norms[1],
        output_error=None if metric is None else errors[1],
    )


def seen(metric: Metric | None, u: Tensor, v: Tensor) -> Bases:
    """Bases as the metric sees them: in whitened coordinates and fp64; themselves without a metric."""
    return (u, v) if metric is None else (metric.whitened_out(u.double()), metric.whitened(v.double()))


def _errors(n: int, before: SliceFit | None, metric: Metric | None) -> list[Tensor]:
    """Squared errors [n] to be filled in: Frobenius, and in the metric where there is one."""
    if before is not None:
        return [each.clone() for each in (before.squared_error, before.output_error) if each is not None]
    return [torch.zeros(n, dtype=torch.float64) for _ in range(1 + (metric is not None))]


def _start(before: SliceFit, k: int, metric: Metric | None) -> Bases | None:
    """The stored bases of a cluster, orthonormal again (in the metric), which a cast and a lift are not."""
    u, v = before.u[k].double(), before.v[k].double()
    if not (u.any() and v.any()):
        return None
    u, v = seen(metric, u, v)
    return torch.linalg.qr(u).Q.float(), torch.linalg.qr(v.T).Q.T.float().contiguous()
