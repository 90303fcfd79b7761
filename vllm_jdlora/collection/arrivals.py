"""New adapters on the bases of a collection: the best cluster, Σ in the stored dtype, the exact error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape
from vllm_jdlora.collection.base_model import name_problem, of_one_base_model
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.arrival import captured_by_spans
from vllm_jdlora.jd.problem import Factors, SliceProblem, squared_error
from vllm_jdlora.jd.projection import refit_sigma

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


def best_clusters(collection: Collection, adapters: Sequence[Adapter]) -> Tensor:
    """[m] int64: the cluster whose bases leave each adapter the smallest relative error over all slices.

    A few slices that all the adapters have leave a short list of clusters; only those are compared on all slices.
    """
    clusters = collection.manifest.clusters
    listed = torch.arange(clusters)
    if clusters > 1 and adapters:
        common = [part for part in collection.manifest.slices if all(part.name in a.slices for a in adapters)]
        probes = common[:: max(1, len(common) // _PROBES)][:_PROBES]
        if len(common) > len(probes) > 0:
            tried = _captured(collection, adapters, probes, listed)
            listed = (tried >= _NEAR * tried.max(1, keepdim=True).values).any(0).nonzero()[:, 0]
    if len(listed) == 1:
        return listed.repeat(len(adapters))
    return listed[_captured(collection, adapters, collection.manifest.slices, listed).argmax(1)]


def _captured(
    collection: Collection, adapters: Sequence[Adapter], slices: Sequence[SliceShape], listed: Tensor
) -> Tensor:
    """[m, listed clusters] fp64: the squared norm that each cluster's bases hold of each adapter."""
    captured = torch.zeros(len(adapters), len(listed), dtype=torch.float64)
    # JD-Diag's columns are not orthogonal, those of the activation metric only in that metric.
    orthonormal = collection.manifest.method == "full" and collection.manifest.metric == "frobenius"
    for part in slices:
        problem = problem_of(factors_of(adapters, part.name), part.name)
        if problem is not None:
            u, v = collection.basis(part.name)
            captured[problem.members] += captured_by_spans(problem, u[listed], v[listed], orthonormal=orthonormal)
    return captured


def project(
    collection: Collection,
    adapters: Sequence[Adapter],
    *,
    cluster: Tensor | None = None,
    bases: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Projections:
    """The best Σ (in the Frobenius norm) of adapters that have no reason to stay plain.

    cluster: [m] clusters to use (default: the best ones). bases: other bases than the collection's, for each slice
    (U [K, d_out, R], V [K, R, d_in]) in the stored dtype. Σ values too large for the stored dtype come out infinite.
    """
    cluster = best_clusters(collection, adapters) if cluster is None else cluster
    slices = collection.manifest.slices
    dtype = TORCH_DTYPES[collection.manifest.dtype]
    sigma: Tensor | None = None
    norms, errors = (torch.zeros(len(adapters), len(slices), dtype=torch.float64) for _ in range(2))
    for m, part in enumerate(slices):
        u, v = collection.basis(part.name) if bases is None else bases[m]
        if sigma is None:
            sigma = torch.zeros(len(adapters), len(slices), *_sigma_shape(collection, u.shape[2]), dtype=dtype)
        factors = factors_of(adapters, part.name)
        problem = problem_of(factors, part.name)
        if problem is None:
            continue
        norms[problem.members, m] = problem.squared_norms
        for k in cluster[problem.members].unique().tolist():
            members = problem.subset((cluster[problem.members] == k).nonzero()[:, 0])
            for i, best in zip(members.members.tolist(), _best_sigma(collection, members, u[k], v[k]), strict=True):
                sigma[i, m] = best.to(dtype)
                stored = sigma[i, m].double()
                f = factors[i]
                assert f is not None
                errors[i, m] = squared_error(f.b, f.a, u[k], stored.diag() if stored.ndim == 1 else stored, v[k])
    assert sigma is not None
    return Projections(
        cluster=cluster,
        sigma=sigma,
        relative_error=(errors.sum(1) / norms.sum(1).clamp_min(_TINY)).sqrt(),
        slice_errors=(errors / norms).sqrt().float(),
    )


def _sigma_shape(collection: Collection, rank: int) -> tuple[int, ...]:
    return (rank,) if collection.manifest.method == "diag" else (rank, rank)


def _best_sigma(collection: Collection, problem: SliceProblem, u: Tensor, v: Tensor) -> Tensor:
    """[m, R, R], or [m, R] for JD-Diag: (UᵀU ∘ VVᵀ) σ = diag(Uᵀ ΔW Vᵀ), the normal equations of a diagonal Σ."""
    if collection.manifest.method != "diag":
        return refit_sigma(problem, u, v)[0]
    left, right = u.double(), v.double().T
    overlap = problem.sigmas(problem.bt.double() @ left, problem.a.double() @ right).diagonal(dim1=1, dim2=2)
    gram = (left.T @ left) * (right.T @ right)
    return (overlap * problem.scale[:, None]) @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True)
