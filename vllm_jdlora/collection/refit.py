"""The fit of a refresh: who belongs to which cluster, then every slice once more from the bases that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.members import Member, MemberSource, bound_surrogates
from vllm_jdlora.collection.own_metric import MetricOfSlice, orthonormal, seen_by_cluster
from vllm_jdlora.collection.quantize import cast_of
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Clustering, refit, settle
from vllm_jdlora.jd.certificate import Certificate, certify_clusters
from vllm_jdlora.jd.clustering import weighted_slices
from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.search import best_assignment
from vllm_jdlora.jd.slice_fit import Bases, Metric, ScalingOverflow, SliceFit, SliceRecipe, fit_slice

Progress = Callable[[str, int, int], None]
# The assignment settles on a few slices spread over the model; then each slice is read and fitted once.
_PROBES = 8
_PROBE_SWEEPS = 4
_ROUNDS = 10
# The search for clusters from nothing, and by how much it must lower the error to be worth other clusters.
_EFFORT, _CLEARLY = 0.3, 0.01
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Refit:
    """n members over S slices; all values as stored. Errors of surrogates are upper bounds, NaN where none is known."""

    bases: list[Bases]  # (U [K, d_out, R], V [K, R, d_in]) for each slice
    cluster: Tensor  # [n]
    sigma: Tensor  # [n, S, R, R], or [n, S, R] (JD-Diag)
    relative_error: Tensor  # [n] fp64 over all slices
    slice_errors: Tensor  # [n, S] fp32, NaN where an adapter has nothing
    output_error: Tensor | None  # both in the collection's metric, where it has one
    slice_output_errors: Tensor | None
    floor: float | None  # as `CollectionManifest.error_floor` and `error_reached`
    reached: float | None

    @property
    def judged(self) -> Tensor:
        """[n] fp64, the error that limits are about."""
        return self.relative_error if self.output_error is None else self.output_error


def settled(
    old: Collection,
    members: Sequence[Member],
    slices: Sequence[SliceShape],
    labels: Tensor,
    metrics: MetricOfSlice | None,
    report: Progress,
) -> Tensor:
    """Labels [n] after rounds of refit and reassignment on the probe slices, from the old bases and assignment.

    JD-Full tells clusters for JD-Diag too, as it does when a collection is compressed.
    """
    everything = _slices(old, members, slices, metrics)
    probes = _probes(old, slices)
    problems = [everything[index] for index in probes]
    bases = [
        orthonormal(*seen_by_cluster(everything.metric(index), *old.basis(slices[index].name))) for index in probes
    ]
    k = old.manifest.clusters
    state = replace(Clustering.unfitted(labels, k), u=[u for u, _ in bases], v=[v for _, v in bases])

    def rounds() -> Iterator[int]:
        for done in range(_ROUNDS):
            report("assign", done, _ROUNDS)
            yield done

    state, accepted = settle(problems, state, old.manifest.rank, _PROBE_SWEEPS, _quiet, rounds())
    report("assign", _ROUNDS, _ROUNDS)
    if k == 1 or accepted is None:
        return state.cluster
    # Alternation stays near the old clusters; newcomers may call for others.
    searched = best_assignment(problems, len(members), old.manifest.rank, k, old.manifest.seed, _quiet, effort=_EFFORT)
    other = refit(problems, Clustering.unfitted(searched, k), old.manifest.rank, _PROBE_SWEEPS, _quiet)
    return searched if other.objective[-1] < (1 - _CLEARLY) * accepted.objective[-1] else state.cluster


def refitted(
    old: Collection,
    members: Sequence[Member],
    slices: Sequence[SliceShape],
    labels: Tensor,
    metrics: MetricOfSlice | None,
    report: Progress,
) -> Refit:
    """Every slice in turn: bases from where they are (JD-Diag has starts of its own), cast or quantised, then Σ.

    Raises:
        JDLoRAError: scaling matrices do not fit into the stored dtype.
    """
    manifest = old.manifest
    dtype = TORCH_DTYPES[manifest.dtype]
    recipe = SliceRecipe(manifest.rank, manifest.method, cast_of(manifest.quantize, dtype), dtype)
    bases, sigma, parts = [], [], []
    bounds: list[Certificate | None] = []
    reached = 0.0
    certified = _probes(old, slices) if _certifiable(old, members) else []
    everything = _slices(old, members, slices, metrics)
    for m, part in enumerate(slices):
        report("fit", m, len(slices))
        problem, metric = everything.plain(m), everything.metric(m)
        warm = _warm_start(old, part, len(members), recipe, metric)
        try:
            fit = fit_slice(
                problem,
                labels,
                manifest.clusters,
                recipe,
                metric=metric,
                energies=everything.energies,
                before=warm,
                changed=range(manifest.clusters),
            )
        except ScalingOverflow as error:
            raise JDLoRAError(
                f"{members[error.adapter].name}: its scaling matrices do not fit into {manifest.dtype}: compress again "
                "in bf16"
            ) from error
        bases.append((fit.u, fit.v))
        sigma.append(fit.sigma)
        parts.append(replace(fit, u=_NOTHING, v=_NOTHING, sigma=_NOTHING))
        if m in certified:
            bounds.append(certify_clusters([everything[m]], labels, manifest.rank))
            reached += float((fit.importance(everything.energies) * fit.relative()).sum())
    report("fit", len(slices), len(slices))
    relative, slice_errors = _errors([p.squared_error for p in parts], [p.squared_norm for p in parts])
    bound_surrogates(old, members, slices, relative, slice_errors, outputs=False)
    output, slice_output = None, None
    if metrics is not None:
        in_it = [(p.output_error, p.output_norm) for p in parts if p.output_error is not None]
        output, slice_output = _errors(*zip(*in_it, strict=True))
        bound_surrogates(old, members, slices, output, slice_output, outputs=True)
    floor, weight = _summed(bounds)
    return Refit(
        bases=bases,
        cluster=labels,
        sigma=torch.stack(sigma, 1),
        relative_error=relative,
        slice_errors=slice_errors.float(),
        output_error=output,
        slice_output_errors=None if slice_output is None else slice_output.float(),
        floor=None if floor is None else (floor / weight) ** 0.5,
        reached=None if floor is None else (reached / weight) ** 0.5,
    )


_NOTHING = torch.zeros(0)


def _slices(
    old: Collection, members: Sequence[Member], slices: Sequence[SliceShape], metrics: MetricOfSlice | None
) -> Slices:
    """As a compression weighs them, by the members' own energies."""
    metric_of = None if metrics is None else (lambda index: metrics(slices[index].name))
    return weighted_slices(MemberSource(old, members, slices), metric_of, old.manifest.seed)


def _probes(old: Collection, slices: Sequence[SliceShape]) -> list[int]:
    """Positions of a few slices, spread over the model, that the old bases know."""
    names = {part.name for part in old.manifest.slices}
    known = [index for index, part in enumerate(slices) if part.name in names]
    return known[:: max(1, len(known) // _PROBES)][:_PROBES]


def _warm_start(
    old: Collection, part: SliceShape, n: int, recipe: SliceRecipe, metric: Metric | None
) -> SliceFit | None:
    """The old bases as a fit of which nothing else is kept; None for a slice that the collection does not have."""
    if part.name not in {known.name for known in old.manifest.slices}:
        return None
    u, v = old.basis(part.name)
    shape = (n, recipe.rank) if recipe.method == "diag" else (n, recipe.rank, recipe.rank)
    zeros = torch.zeros(n, dtype=torch.float64)
    return SliceFit(
        u=u,
        v=v,
        sigma=torch.zeros(shape, dtype=recipe.sigma_dtype),
        squared_norm=zeros,
        squared_error=zeros,
        captured=torch.zeros(n, len(u), dtype=torch.float64),
        output_norm=None if metric is None else zeros,
        output_error=None if metric is None else zeros,
    )


def _certifiable(old: Collection, members: Sequence[Member]) -> bool:
    """A floor is one of JD-Full, and of the adapters themselves."""
    return old.manifest.method == "full" and all(member.adapter is not None for member in members)


def _summed(bounds: Sequence[Certificate | None]) -> tuple[float | None, float]:
    """(squared floor, weight) of several slices; no floor where one of them has none."""
    known = [each for each in bounds if each is not None]
    weight = max(sum(each.weight for each in known), 1.0)
    complete = len(bounds) == len(known) > 0
    return (sum(each.lower for each in known) if complete else None), weight


def _errors(squared_errors: Sequence[Tensor], squared_norms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Relative errors (not squared) of n adapters over all slices [n], and in each [n, S]; from [n] for each slice."""
    errors, norms = torch.stack(list(squared_errors), 1), torch.stack(list(squared_norms), 1)
    return (errors.sum(1) / norms.sum(1).clamp_min(_TINY)).sqrt(), (errors / norms).sqrt()


def _quiet(stage: str, done: int, total: int) -> None:
    pass
