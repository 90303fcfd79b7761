"""New adapters on the bases of a collection: the best cluster, Σ in the stored dtype, the exact error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape
from vllm_jdlora.collection.base_model import name_problem, of_one_base_model
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.own_metric import MetricOfSlice, in_metric, seen_by_cluster
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.arrival import captured_by_spans
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.projection import squared_errors
from vllm_jdlora.jd.slice_fit import METHODS, seen

# Clusters that hold less than half of what the best one does on a few slices are not compared on all of them: saves
# most of the time for an adapter of a family that is there, nothing for a stranger, whose best cluster is a near tie.
_PROBES, _NEAR = 8, 0.5
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Projections:
    """m adapters on bases of S slices; every error is that of the values as stored."""

    cluster: Tensor  # [m] int64
    sigma: Tensor  # [m, S, R, R] or [m, S, R] (JD-Diag), stored dtype; zero where an adapter has nothing
    relative_error: Tensor  # [m] fp64, ‖ΔW − UΣV‖_F / ‖ΔW‖_F over all slices, not squared
    slice_errors: Tensor  # [m, S] fp32, NaN where an adapter has nothing
    output_error: Tensor | None = None  # both in the collection's metric, where its moments are at hand
    slice_output_errors: Tensor | None = None

    @property
    def judged(self) -> Tensor:
        """[m] fp64, the error that limits and comparisons are about: in the metric where it is known."""
        return self.relative_error if self.output_error is None else self.output_error


def check_base_model(collection: Collection, adapters: Sequence[Adapter], asked: str | None) -> None:
    """The adapters belong to the collection's base model, or to the one `asked` for (a name or a folder).

    Raises:
        JDLoRAError: the first one that does not, or a slice of another shape.
    """
    known = {part.name: part for part in collection.manifest.slices}
    if asked is not None:
        of_one_base_model(adapters, asked)
    for adapter in adapters:
        # The recorded name is data from outside, never a path to look into.
        name = collection.manifest.base_model.name
        problem = None if asked or not name else name_problem(adapter, name, f"{collection.path.name} holds those of")
        if problem:
            raise JDLoRAError(problem)
        for part in adapter.slices.values():
            shape = known.get(part.shape.name, part.shape)
            if shape != part.shape:
                raise JDLoRAError(
                    f"{adapter.path / WEIGHTS_FILE}: {shape.name} is {part.shape.d_out} x {part.shape.d_in}, in "
                    f"{collection.path.name} it is {shape.d_out} x {shape.d_in}: the adapter is for another base model"
                )


def reason_to_stay_plain(collection: Collection, adapter: Adapter) -> str | None:
    """Why an adapter cannot be projected on the collection's bases; None for one that can."""
    if adapter.plain_only:
        return f"cannot be compressed: {adapter.plain_only}"
    unknown = sorted(set(adapter.slices) - {part.name for part in collection.manifest.slices})
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        return f"the collection has no bases for {unknown[0]}{more}: refresh it to compress this adapter"
    return None


def factors_of(adapters: Sequence[Adapter], slice_name: str) -> list[Factors | None]:
    pairs = [adapter.factors(slice_name) for adapter in adapters]
    return [None if pair is None else Factors(*pair) for pair in pairs]


def problem_of(factors: Sequence[Factors | None], slice_name: str) -> SliceProblem | None:
    """None where none of the adapters has anything in the slice."""
    return SliceProblem.from_factors(factors, slice_name) if any(f is not None for f in factors) else None


def best_clusters(collection: Collection, adapters: Sequence[Adapter], metrics: MetricOfSlice | None = None) -> Tensor:
    """[m] int64: the cluster whose bases leave each adapter the smallest error (in the metric) over all slices.

    A few slices that all the adapters have leave a short list of clusters; only those are compared on all slices.
    """
    clusters = collection.manifest.clusters
    listed = torch.arange(clusters)
    if clusters > 1 and adapters:
        common = [part for part in collection.manifest.slices if all(part.name in a.slices for a in adapters)]
        probes = common[:: max(1, len(common) // _PROBES)][:_PROBES]
        if len(common) > len(probes) > 0:
            tried = _captured(collection, adapters, probes, listed, metrics)
            listed = (tried >= _NEAR * tried.max(1, keepdim=True).values).any(0).nonzero()[:, 0]
    if len(listed) == 1:
        return listed.repeat(len(adapters))
    return listed[_captured(collection, adapters, collection.manifest.slices, listed, metrics).argmax(1)]


def _captured(
    collection: Collection,
    adapters: Sequence[Adapter],
    slices: Sequence[SliceShape],
    listed: Tensor,
    metrics: MetricOfSlice | None,
) -> Tensor:
    """[m, listed clusters] fp64: the squared norm (in the metric) that each cluster's bases hold of each adapter."""
    captured = torch.zeros(len(adapters), len(listed), dtype=torch.float64)
    manifest = collection.manifest
    for part in slices:
        problem = problem_of(factors_of(adapters, part.name), part.name)
        if problem is None:
            continue
        metric, view = in_metric(metrics, part.name, problem)
        whole = len(listed) == manifest.clusters
        u, v = seen_by_cluster(metric, *collection.basis(part.name, None if whole else listed.tolist()))
        if manifest.method == "diag":  # a diagonal Σ holds less than the spans do
            held = METHODS["diag"].captured(view, u, v) * view.squared_norms[:, None]
        else:  # bases of another metric are orthonormal only in it, where a lift and bases that grew tilt them
            held = captured_by_spans(view, u, v, orthonormal=manifest.metric == "frobenius")
        captured[problem.members] += held
    return captured


def project(
    collection: Collection,
    adapters: Sequence[Adapter],
    *,
    cluster: Tensor | None = None,
    bases: Sequence[tuple[Tensor, Tensor]] | None = None,
    metrics: MetricOfSlice | None = None,
    given: Tensor | None = None,
) -> Projections:
    """The best Σ of adapters that have no reason to stay plain: of least error in the metric, or in Frobenius norm.

    cluster: [m] clusters to use (default: the best ones). bases: other bases than the collection's, for each slice
    (U [K, d_out, R], V [K, R, d_in]) in the stored dtype. given: Σ of `Projections.sigma`'s shape to be measured in the
    place of the best. Σ values too large for the stored dtype come out infinite.
    """
    cluster = best_clusters(collection, adapters, metrics) if cluster is None else cluster
    manifest = collection.manifest
    slices, dtype, refit = manifest.slices, TORCH_DTYPES[manifest.dtype], METHODS[manifest.method].refit
    # Frobenius, and in the metric.
    norms, errors = (torch.zeros(2, len(adapters), len(slices), dtype=torch.float64) for _ in range(2))
    rank = manifest.rank if bases is None else bases[0][0].shape[2]
    shape = (rank,) * (1 if manifest.method == "diag" else 2)
    sigma = torch.zeros(len(adapters), len(slices), *shape, dtype=dtype)
    for m, part in enumerate(slices):
        problem = problem_of(factors_of(adapters, part.name), part.name)
        if problem is None:
            continue
        metric, view = in_metric(metrics, part.name, problem)
        norms[0, problem.members, m], norms[1, problem.members, m] = problem.squared_norms, view.squared_norms
        for k in cluster[problem.members].unique().tolist():
            positions = (cluster[problem.members] == k).nonzero()[:, 0]
            plain, own = problem.subset(positions), view.subset(positions)
            u, v = (side[0] for side in collection.basis(part.name, [k])) if bases is None else (b[k] for b in bases[m])
            seen_u, seen_v = seen(metric, u, v)
            best = refit(own, seen_u, seen_v)[0].to(dtype) if given is None else given[own.members, m].to(dtype)
            sigma[own.members, m] = best
            errors[0, own.members, m] = squared_errors(plain, u, best, v)
            if metric is not None:
                errors[1, own.members, m] = squared_errors(own, seen_u, best, seen_v)
    whole = (errors.sum(2) / norms.sum(2).clamp_min(_TINY)).sqrt()
    by_slice = (errors / norms).sqrt().float()
    return Projections(
        cluster=cluster,
        sigma=sigma,
        relative_error=whole[0],
        slice_errors=by_slice[0],
        output_error=None if metrics is None else whole[1],
        slice_output_errors=None if metrics is None else by_slice[1],
    )
