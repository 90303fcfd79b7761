"""Fit a collection's bases again, warm-started from its own, with adapters that came since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.arrivals import check_base_model, project, reason_to_stay_plain
from vllm_jdlora.collection.drift import Drift, drift
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.members import Member, at_hand_of, clusters_of, members_of, slices_of
from vllm_jdlora.collection.own_metric import required_metric
from vllm_jdlora.collection.refit import Progress, Refit, refitted, settled
from vllm_jdlora.collection.rewrite import (
    adapter_entry,
    open_for_editing,
    plain_entry,
    require_undamaged,
    rewritten,
)
from vllm_jdlora.collection.schema import METRIC_ERRORS, AdapterEntry, PlainEntry
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.known_mean import mean_of_known


@dataclass(frozen=True)
class Refreshed:
    """What `refresh` did. Errors are means (not squared) over the compressed adapters whose error is known.

    The last two are those in the collection's metric; None where it has none, or no error in it is known.
    """

    collection: Collection
    new: tuple[str, ...]
    changed: tuple[str, ...]  # other files than those the old collection was made of
    moved: tuple[str, ...]
    surrogates: tuple[str, ...]  # fitted from their UΣV; their errors are upper bounds
    error_before: float
    error_after: float
    output_before: float | None
    output_after: float | None


def refresh(
    path: Path,
    originals: Sequence[Adapter],
    output: Path,
    *,
    moments: SecondMoments | None = None,
    max_error: float | None = None,
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Refreshed:
    """Fit the collection at `path` again with `originals`: its own adapters' uncompressed forms, and new ones.

    Rank, clusters, method, metric, dtype, quantisation and seed stay. Bases start from the old ones (those of JD-Diag
    from nothing), stored adapters from their clusters, new ones from the cluster that fits them best. Adapters kept
    plain take part from their own folders. A stored adapter whose original is missing takes part as its UΣV, and its
    recorded error is the upper bound e + (1 + e)·ε of the old error e and the new one ε of the UΣV.

    moments: of the text that the collection was calibrated with, where it was fitted in another metric than the
    Frobenius norm. max_error: adapters with a larger error in that metric stay plain (default: the collection's).

    Raises:
        JDLoRAError: moments are missing or of another calibration, an adapter does not fit to the collection, or
            ``output`` cannot be written.
    """
    report = progress or _quiet
    with open_for_editing(path) as old:
        manifest = old.manifest
        required_metric(old, moments, manifest.slices)  # before the work of reading
        require_undamaged(old, list(manifest.files))
        max_error = manifest.max_error if max_error is None else max_error
        at_hand = at_hand_of(old, originals)
        check_base_model(old, list(at_hand.values()), base_model)
        plain = [plain_entry(a, f"cannot be compressed: {a.plain_only}") for a in at_hand.values() if a.plain_only]
        members = members_of(old, [a for a in at_hand.values() if not a.plain_only])
        slices = slices_of(old, members)
        metrics = required_metric(old, moments, slices)
        labels = clusters_of(old, members, metrics)
        if manifest.clusters > 1:
            labels = settled(old, members, slices, labels, metrics, report)
        fit = refitted(old, members, slices, labels, metrics, report)
        kind = METRIC_ERRORS[manifest.metric]
        entries, kept, refused = _entries(members, fit, manifest.adapters, max_error, kind)
        plain += refused
        if not kept:
            article = "an" if kind[0] == "o" else "a"
            raise JDLoRAError(f"every adapter has {article} {kind} above {max_error:g}: allow more error")
        with rewritten(old, output, force=force) as draft:
            draft.bases(slices, fit.bases, manifest.quantize)
            draft.all_scalings(fit.sigma[kept])
            draft.errors(
                fit.slice_errors[kept], None if fit.slice_output_errors is None else fit.slice_output_errors[kept]
            )
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
                    error_floor=fit.floor,
                    error_reached=fit.reached,
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
            error_before=mean_of_known([a.relative_error for a in manifest.adapters]) or 0.0,
            error_after=mean_of_known([e.relative_error for e in entries]) or 0.0,
            output_before=mean_of_known([a.output_error for a in manifest.adapters]),
            output_after=mean_of_known([e.output_error for e in entries]),
        )


def expected_drift(
    path: Path,
    originals: Sequence[Adapter],
    *,
    moments: SecondMoments | None = None,
    base_model: str | None = None,
) -> Drift | None:
    """What `refresh` would gain, from a few slices; None where nothing new can be projected on the bases.

    Raises:
        JDLoRAError: as `refresh`, where an adapter does not belong to the collection or moments are missing.
    """
    old = Collection.open(path, verify=False)
    metrics = required_metric(old, moments, old.manifest.slices)
    check_base_model(old, originals, base_model)
    unchanged = {entry.name: entry.sha256 for entry in old.manifest.adapters}
    own = {a.name: a for a in originals if unchanged.get(a.name) == a.sha256}
    arrivals = [a for a in originals if a.name not in own and reason_to_stay_plain(old, a) is None]
    if not arrivals:
        return None
    return drift(old, arrivals, project(old, arrivals, metrics=metrics), originals=own, metrics=metrics)


def _entries(
    members: Sequence[Member], fit: Refit, before: Sequence[AdapterEntry], max_error: float | None, kind: str
) -> tuple[list[AdapterEntry], list[int], list[PlainEntry]]:
    """Entries and rows of what stays compressed, and plain entries of originals above the limit.

    A surrogate has nothing better than its UΣV: it stays compressed whatever the limit.
    """
    entries, kept, plain = [], [], []
    for i, member in enumerate(members):
        error, judged, cluster = float(fit.relative_error[i]), float(fit.judged[i]), int(fit.cluster[i])
        output = None if fit.output_error is None or fit.output_error[i].isnan() else judged
        if member.adapter is None:
            assert member.row is not None
            entries.append(replace(before[member.row], cluster=cluster, relative_error=error, output_error=output))
        elif max_error is not None and judged > max_error:
            plain.append(plain_entry(member.adapter, f"{kind} {judged:.3f} is above {max_error:g}", error))
            continue
        else:
            entries.append(adapter_entry(member.adapter, cluster, error, output))
        kept.append(i)
    return entries, kept, plain


def _quiet(stage: str, done: int, total: int) -> None:
    pass
