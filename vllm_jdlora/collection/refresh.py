"""Fit a collection's bases again, warm-started from its own, with adapters that came since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter, SliceShape
from vllm_jdlora.collection.arrivals import check_base_model, project, reason_to_stay_plain
from vllm_jdlora.collection.drift import Drift, drift
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.members import (
    Member,
    at_hand_of,
    bound_surrogates,
    factors_of_members,
    members_of,
    slices_of,
)
from vllm_jdlora.collection.rewrite import (
    adapter_entry,
    open_for_editing,
    plain_entry,
    require_undamaged,
    rewritten,
)
from vllm_jdlora.collection.schema import AdapterEntry, PlainEntry
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Clustering, reassign, refit
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem, squared_error, squared_norm
from vllm_jdlora.jd.projection import refit_sigma
from vllm_jdlora.jd.search import best_assignment

Progress = Callable[[str, int, int], None]
# The assignment settles on a few slices spread over the model; then each slice is read and fitted once.
_PROBES = 8
_PROBE_SWEEPS = 4
_ROUNDS = 10
_SWEEPS = 20
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did. Errors are means of relative errors (not squared) over the compressed adapters."""

    collection: Collection
    new: tuple[str, ...]
    changed: tuple[str, ...]  # other files than those the old collection was made of
    moved: tuple[str, ...]
    surrogates: tuple[str, ...]  # fitted from their UΣV; their errors are upper bounds
    error_before: float
    error_after: float


def refresh(
    path: Path,
    originals: Sequence[Adapter],
    output: Path,
    *,
    max_error: float | None = None,
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Refreshed:
    """Fit the collection at `path` again with `originals`: its own adapters' uncompressed forms, and new ones.

    Rank, clusters, dtype and seed stay. Bases start from the old ones, stored adapters from their clusters, new ones
    from the cluster that fits them best. Adapters kept plain take part from their own folders. A stored adapter whose
    original is missing takes part as its UΣV, and its recorded error is the upper bound e + (1 + e)·ε of the old
    error e and the new one ε of the UΣV.

    Raises:
        JDLoRAError: the collection was fitted in another way than JD-Full in the Frobenius norm, an adapter does not
            fit to it, or ``output`` cannot be written.
    """
    report = progress or _quiet
    with open_for_editing(path) as old:
        manifest = old.manifest
        _require_refreshable(old)
        require_undamaged(old, list(manifest.files))
        max_error = manifest.max_error if max_error is None else max_error
        at_hand = at_hand_of(old, originals)
        check_base_model(old, list(at_hand.values()), base_model)
        plain = [plain_entry(a, f"cannot be compressed: {a.plain_only}") for a in at_hand.values() if a.plain_only]
        members, labels = members_of(old, [a for a in at_hand.values() if not a.plain_only])
        slices = slices_of(old, members)
        if manifest.clusters > 1:
            labels = _settled(old, members, slices, labels, report)
        fit = _fitted(old, members, slices, labels, report)
        entries, kept, refused = _entries(members, fit, manifest.adapters, max_error)
        plain += refused
        if not kept:
            raise JDLoRAError(f"every adapter has a relative error above {max_error:g}: allow more error")
        with rewritten(old, output, force=force) as draft:
            draft.bases(slices, fit.bases)
            draft.all_scalings(fit.sigma[kept])
            draft.errors(fit.slice_errors[kept])
            for entry in plain:
                draft.add_plain(at_hand[entry.name])
            draft.seal(
                replace(
                    manifest,
                    slices=tuple(slices),
                    adapters=tuple(entries),
                    plain=tuple(sorted(plain, key=lambda p: p.name)),
                    skipped=tuple(s for s in manifest.skipped if s.name not in at_hand),
                    files=draft.files,
                    revision="",
                )
            )
        cluster_before = {a.name: a.cluster for a in manifest.adapters}
        content = {a.name: a.sha256 for a in manifest.adapters} | {p.name: p.sha256 for p in manifest.plain}
        return Refreshed(
            Collection.open(output, verify=False),
            new=tuple(m.name for m in members if m.name not in content),
            changed=tuple(a.name for a in at_hand.values() if content.get(a.name, a.sha256) != a.sha256),
            moved=tuple(e.name for e in entries if e.cluster != cluster_before.get(e.name, e.cluster)),
            surrogates=tuple(m.name for m in members if m.adapter is None),
            error_before=_mean([a.relative_error for a in manifest.adapters]),
            error_after=_mean([e.relative_error for e in entries]),
        )


def expected_drift(path: Path, originals: Sequence[Adapter], *, base_model: str | None = None) -> Drift | None:
    """What `refresh` would gain, from a few slices; None where nothing new can be projected on the bases.

    Raises:
        JDLoRAError: an adapter does not belong to the collection.
    """
    old = Collection.open(path, verify=False)
    check_base_model(old, originals, base_model)
    unchanged = {entry.name: entry.sha256 for entry in old.manifest.adapters}
    own = {a.name: a for a in originals if unchanged.get(a.name) == a.sha256}
    arrivals = [a for a in originals if a.name not in own and reason_to_stay_plain(old, a) is None]
    if not arrivals:
        return None
    return drift(old, arrivals, project(old, arrivals), originals=own)


# The search for clusters from nothing, and by how much it must lower the error to be worth other clusters.
_EFFORT, _CLEARLY = 0.3, 0.01


@dataclass(frozen=True, eq=False)
class _Fit:
    bases: list[tuple[Tensor, Tensor]]  # (U [K, d_out, R], V [K, R, d_in]) for each slice, stored dtype
    cluster: Tensor  # [n]
    sigma: Tensor  # [n, S, R, R], stored dtype
    relative_error: Tensor  # [n] fp64 over all slices; an upper bound for surrogates
    slice_errors: Tensor  # [n, S] fp32, NaN where an adapter has nothing


def _require_refreshable(old: Collection) -> None:
    method, metric = old.manifest.method, old.manifest.metric
    if method != "full" or metric != "frobenius":
        raise JDLoRAError(
            f"{old.path}: fitted by JD-{method} in the {metric} metric; only JD-Full in the Frobenius norm is "
            "refreshed: compress the adapters again"
        )
    if old.manifest.quantize != "none":
        raise JDLoRAError(
            f"{old.path}: bases in {old.manifest.quantize} are not refreshed: compress the adapters again"
        )


def _old_bases(old: Collection, part: SliceShape) -> tuple[Tensor, Tensor] | None:
    """(U [K, d_out, R], V [K, R, d_in]) fp32; None for a slice that the collection does not have."""
    if part.name not in {known.name for known in old.manifest.slices}:
        return None
    u, v = old.basis(part.name)
    return u.float(), v.float()


def _settled(
    old: Collection, members: Sequence[Member], slices: Sequence[SliceShape], labels: Tensor, report: Progress
) -> Tensor:
    """Labels [n] after rounds of refit and reassignment on the probe slices, from the old bases and assignment."""
    known = [part for part in slices if _old_bases(old, part) is not None]
    probes = known[:: max(1, len(known) // _PROBES)][:_PROBES]
    problems = [SliceProblem.from_factors(factors_of_members(old, members, part.name), part.name) for part in probes]
    bases = [pair for part in probes if (pair := _old_bases(old, part)) is not None]
    k = old.manifest.clusters
    nothing = Clustering.unfitted(labels, k)
    state = replace(nothing, u=[u for u, _ in bases], v=[v for _, v in bases])
    accepted: Clustering | None = None
    for done in range(_ROUNDS):
        report("assign", done, _ROUNDS)
        fitted = refit(problems, state, old.manifest.rank, _PROBE_SWEEPS, _quiet)
        if accepted is not None and fitted.objective[-1] > accepted.objective[-1]:
            state = accepted
            break
        accepted = fitted
        state = reassign(fitted)
        if not state.changed:
            break
    report("assign", _ROUNDS, _ROUNDS)
    if k == 1 or accepted is None:
        return state.cluster
    # Alternation stays near the old clusters; newcomers may call for others.
    searched = best_assignment(problems, len(members), old.manifest.rank, k, old.manifest.seed, _quiet, effort=_EFFORT)
    other = refit(problems, Clustering.unfitted(searched, k), old.manifest.rank, _PROBE_SWEEPS, _quiet)
    return searched if other.objective[-1] < (1 - _CLEARLY) * accepted.objective[-1] else state.cluster


def _fitted(
    old: Collection, members: Sequence[Member], slices: Sequence[SliceShape], labels: Tensor, report: Progress
) -> _Fit:
    """Every slice in turn: warm-started bases, cast, Σ refitted on the cast bases, errors of the stored values."""
    manifest = old.manifest
    n, rank, dtype = len(members), manifest.rank, TORCH_DTYPES[manifest.dtype]
    sigma = torch.zeros(n, len(slices), rank, rank, dtype=dtype)
    norms, errors = (torch.zeros(n, len(slices), dtype=torch.float64) for _ in range(2))
    bases = []
    for m, part in enumerate(slices):
        report("fit", m, len(slices))
        factors = factors_of_members(old, members, part.name)
        problem = SliceProblem.from_factors(factors, part.name)
        u = torch.zeros(manifest.clusters, part.d_out, rank, dtype=dtype)
        v = torch.zeros(manifest.clusters, rank, part.d_in, dtype=dtype)
        start = _old_bases(old, part)
        for k in labels[problem.members].unique().tolist():
            own = problem.subset((labels[problem.members] == k).nonzero()[:, 0])
            warm = None if start is None else (start[0][k], start[1][k])
            fit = fit_full(own, rank, start=warm, max_sweeps=_SWEEPS)
            u[k], v[k] = fit.u.to(dtype), fit.v.to(dtype)
            sigma[own.members, m] = refit_sigma(own, u[k], v[k])[0].to(dtype)
        for i, f in enumerate(factors):
            if f is not None:
                norms[i, m] = squared_norm(f.b, f.a)
                errors[i, m] = squared_error(f.b, f.a, u[labels[i]], sigma[i, m], v[labels[i]])
        bases.append((u, v))
    report("fit", len(slices), len(slices))
    overflow = ~sigma.isfinite().flatten(1).all(1)
    if bool(overflow.any()):
        name = members[int(overflow.int().argmax())].name
        raise JDLoRAError(f"{name}: its scaling matrices do not fit into {manifest.dtype}: compress again in bf16")
    whole = (errors.sum(1) / norms.sum(1).clamp_min(_TINY)).sqrt()
    by_slice = (errors / norms).sqrt()
    bound_surrogates(old, members, slices, whole, by_slice)
    return _Fit(bases, labels, sigma, whole, by_slice.float())


def _entries(
    members: Sequence[Member], fit: _Fit, before: Sequence[AdapterEntry], max_error: float | None
) -> tuple[list[AdapterEntry], list[int], list[PlainEntry]]:
    """Entries and rows of what stays compressed, and plain entries of originals above the limit.

    A surrogate has nothing better than its UΣV: it stays compressed whatever the limit.
    """
    entries, kept, plain = [], [], []
    for i, member in enumerate(members):
        error, cluster = float(fit.relative_error[i]), int(fit.cluster[i])
        if member.adapter is None:
            assert member.row is not None
            entries.append(replace(before[member.row], cluster=cluster, relative_error=error))
        elif max_error is not None and error > max_error:
            plain.append(plain_entry(member.adapter, f"relative error {error:.3f} is above {max_error:g}", error))
            continue
        else:
            entries.append(adapter_entry(member.adapter, cluster, error))
        kept.append(i)
    return entries, kept, plain


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quiet(stage: str, done: int, total: int) -> None:
    pass
