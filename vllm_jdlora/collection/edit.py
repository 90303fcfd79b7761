"""Adding adapters to a collection and removing them, without fitting its bases again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.arrivals import (
    Projections,
    best_clusters,
    check_base_model,
    project,
    reason_to_stay_plain,
)
from vllm_jdlora.collection.drift import Drift, drift
from vllm_jdlora.collection.growth import grown_bases
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.own_metric import MetricOfSlice, own_metric
from vllm_jdlora.collection.rewrite import (
    Draft,
    adapter_entry,
    open_for_editing,
    plain_entry,
    require_undamaged,
    rewritten,
)
from vllm_jdlora.collection.schema import (
    BASES_FILE,
    ERRORS_FILE,
    METRIC_ERRORS,
    AdapterEntry,
    CollectionManifest,
    PlainEntry,
)
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError


@dataclass(frozen=True)
class Added:
    """What `add` did. ``drift`` is None where no adapter could be projected."""

    collection: Collection
    compressed: tuple[AdapterEntry, ...]
    plain: tuple[PlainEntry, ...]
    replaced: tuple[str, ...]
    drift: Drift | None


def add(
    path: Path,
    adapters: Sequence[Adapter],
    *,
    output: Path | None = None,
    moments: SecondMoments | None = None,
    max_error: float | None = None,
    grow: int = 0,
    replace_same_name: bool = False,
    base_model: str | None = None,
    force: bool = False,
) -> Added:
    """Project adapters on the bases of the collection at `path`, each on the cluster that leaves the least error.

    Args:
        path: the collection; changed in place (swapped atomically) unless there is an ``output``.
        adapters: checked adapters with different names.
        output: folder for the new collection; ``force`` replaces one that is there.
        moments: of the text that the collection was calibrated with, where it was fitted in another metric than the
            Frobenius norm: clusters, Σ and grown directions are then the best in that metric. Without them they are
            the best in the Frobenius norm, and the new adapters' errors in the metric are recorded as not known.
        max_error: an adapter with a larger error is stored uncompressed: in the metric with ``moments``, else the
            relative one (default: the collection's own limit where it records one for that error).
        grow: D directions appended to the bases of each cluster that takes adapters (notes: residual directions of
            the new adapters); every Σ is padded, the other adapters' UΣV stay what they were. D = ρ holds one new
            adapter of rank ρ without loss, but for the rounding of bases in 8 or 16 bits.
        replace_same_name: an adapter of a known name takes that one's place instead of being refused.
        base_model: name or folder of the base model to check the new adapters against.

    Raises:
        JDLoRAError: a name is taken, an adapter is for another base model, moments are not those of the collection's
            calibration, or nothing can be written. The collection is then as it was.
    """
    adapters = sorted(adapters, key=lambda a: a.name)
    if not adapters:
        raise JDLoRAError("there are no adapters to add")
    with open_for_editing(path) as old:
        manifest = old.manifest
        metrics = own_metric(old, moments, manifest.slices)
        if max_error is None and (manifest.metric == "frobenius" or metrics is not None):  # else another error's limit
            max_error = manifest.max_error
        replaced = _taken_names(old, adapters, replace_same_name)
        check_base_model(old, adapters, base_model)
        if grow and manifest.method != "full":
            raise JDLoRAError(f"{path}: bases grow for JD-Full only, this collection is JD-{manifest.method}")
        # Bases that are kept keep their digest, which tells of damage when the collection is opened.
        require_undamaged(old, [BASES_FILE, ERRORS_FILE] if grow else [ERRORS_FILE])
        new = _projected(old, adapters, grow, max_error, metrics)
        kept = [row for row, entry in enumerate(manifest.adapters) if entry.name not in replaced]
        if not kept and not new.entries:
            raise JDLoRAError(f"{path}: no compressed adapter would be left; compress the adapters anew")
        with rewritten(old, output, force=force) as draft:
            _write_added(draft, old, adapters, new, kept, replaced)
        collection = Collection.open(old.path if output is None else output, verify=False)
        return Added(collection, new.entries, new.plain, tuple(sorted(replaced)), new.drift)


@dataclass(frozen=True, eq=False)
class _New:
    """The adapters to add: entries with their rows of Σ and errors, plain ones, bases grown by `wider`."""

    entries: tuple[AdapterEntry, ...]
    sigma: Tensor  # [m, S, R + wider, R + wider], or [m, S, R]
    slice_errors: Tensor  # [m, S]
    slice_output_errors: Tensor  # [m, S] in the collection's metric, NaN where not known
    plain: tuple[PlainEntry, ...]
    bases: list[tuple[Tensor, Tensor]] | None  # None: the collection's own
    wider: int
    drift: Drift | None


def _projected(
    old: Collection, adapters: Sequence[Adapter], grow: int, max_error: float | None, metrics: MetricOfSlice | None
) -> _New:
    reasons = {a.name: reason for a in adapters if (reason := reason_to_stay_plain(old, a))}
    plain = [plain_entry(a, reasons[a.name]) for a in adapters if a.name in reasons]
    able = [a for a in adapters if a.name not in reasons]
    if not able:
        nothing = torch.zeros(0, len(old.manifest.slices))
        return _New((), nothing, nothing, nothing, tuple(plain), None, 0, None)
    cluster = best_clusters(old, able, metrics)
    found = project(old, able, cluster=cluster, metrics=metrics)
    change = drift(old, able, found, metrics=metrics)
    bases = grown_bases(old, able, cluster, grow, metrics) if grow else None
    if bases is not None:
        found = project(old, able, cluster=cluster, bases=bases, metrics=metrics)
    taken, refused = _under_the_limit(old, able, found, max_error)
    if not taken:
        bases = None  # nothing would use the new directions
    output, by_slice = found.output_error, found.slice_output_errors
    return _New(
        entries=tuple(
            adapter_entry(
                able[i], int(cluster[i]), float(found.relative_error[i]), None if output is None else float(output[i])
            )
            for i in taken
        ),
        sigma=found.sigma[taken],
        slice_errors=found.slice_errors[taken],
        slice_output_errors=(torch.full_like(found.slice_errors, float("nan")) if by_slice is None else by_slice)[
            taken
        ],
        plain=tuple(sorted([*plain, *refused], key=lambda entry: entry.name)),
        bases=bases,
        wider=grow if bases is not None else 0,
        drift=change,
    )


def _write_added(
    draft: Draft, old: Collection, adapters: Sequence[Adapter], new: _New, kept: Sequence[int], replaced: set[str]
) -> None:
    manifest = old.manifest
    if new.bases is None:
        draft.keep(BASES_FILE)
    else:
        draft.bases(manifest.slices, new.bases, manifest.quantize)
    _write_rows(draft, old, kept, new.sigma, (new.slice_errors, new.slice_output_errors), new.wider)
    kept_plain = [entry for entry in manifest.plain if entry.name not in replaced]
    for entry in kept_plain:
        draft.keep_plain(entry.name)
    by_name = {adapter.name: adapter for adapter in adapters}
    for entry in new.plain:
        draft.add_plain(by_name[entry.name])
    if new.entries or len(kept) < len(manifest.adapters):
        manifest = _uncertified(manifest)
    draft.seal(
        replace(
            manifest,
            rank=manifest.rank + new.wider,
            adapters=(*(manifest.adapters[row] for row in kept), *new.entries),
            plain=tuple(sorted([*kept_plain, *new.plain], key=lambda entry: entry.name)),
            skipped=tuple(entry for entry in manifest.skipped if entry.name not in by_name),
            files=draft.files,
            revision="",
        )
    )


@dataclass(frozen=True)
class Removed:
    """What `remove` did: the names that had Σ rows, and those that had plain folders."""

    collection: Collection
    compressed: tuple[str, ...]
    plain: tuple[str, ...]


def remove(path: Path, names: Sequence[str], *, output: Path | None = None, force: bool = False) -> Removed:
    """Drop adapters by name: their Σ rows and errors, or their plain folders. Bases stay and still carry traces.

    Raises:
        JDLoRAError: an unknown name, or no compressed adapter would be left. The collection is then as it was.
    """
    wanted = set(names)
    with open_for_editing(path) as old:
        manifest = old.manifest
        known = {a.name for a in manifest.adapters} | {p.name for p in manifest.plain}
        if unknown := sorted(wanted - known):
            raise JDLoRAError(f"{path}: no adapter named {unknown[0]!r}; nothing was removed")
        kept = [row for row, entry in enumerate(manifest.adapters) if entry.name not in wanted]
        if not kept:
            raise JDLoRAError(f"{path}: no compressed adapter would be left; delete the folder instead")
        require_undamaged(old, [ERRORS_FILE])
        with rewritten(old, output, force=force) as draft:
            draft.keep(BASES_FILE)
            if len(kept) == len(manifest.adapters):
                for name in manifest.files:
                    if name != BASES_FILE:
                        draft.keep(name)
            else:
                nothing = torch.zeros(0, len(manifest.slices))
                _write_rows(draft, old, kept, torch.zeros(0), (nothing, nothing), 0)
                manifest = _uncertified(manifest)
            plain = tuple(entry for entry in manifest.plain if entry.name not in wanted)
            for entry in plain:
                draft.keep_plain(entry.name)
            adapters = tuple(manifest.adapters[row] for row in kept)
            draft.seal(replace(manifest, adapters=adapters, plain=plain, files=draft.files, revision=""))
        return Removed(
            Collection.open(old.path if output is None else output, verify=False),
            tuple(sorted(wanted & {a.name for a in manifest.adapters})),
            tuple(sorted(wanted & {p.name for p in manifest.plain})),
        )


def _taken_names(old: Collection, adapters: Sequence[Adapter], replace_same_name: bool) -> set[str]:
    known = {a.name for a in old.manifest.adapters} | {p.name for p in old.manifest.plain}
    names = [a.name for a in adapters]
    if len(set(names)) != len(names):
        raise JDLoRAError("two of the adapters to add have one name; rename a folder")
    clashes = known & set(names)
    if clashes and not replace_same_name:
        raise JDLoRAError(
            f"{old.path}: has an adapter named {sorted(clashes)[0]!r} already; rename the new one's folder, or give "
            "--replace to put it in the old one's place"
        )
    return clashes


def _under_the_limit(
    old: Collection, adapters: Sequence[Adapter], found: Projections, max_error: float | None
) -> tuple[list[int], list[PlainEntry]]:
    """Positions of the adapters to store compressed, and the entries of those that stay plain."""
    kind = METRIC_ERRORS["frobenius" if found.output_error is None else old.manifest.metric]
    taken: list[int] = []
    plain: list[PlainEntry] = []
    for i, adapter in enumerate(adapters):
        error, judged = float(found.relative_error[i]), float(found.judged[i])
        if not bool(found.sigma[i].isfinite().all()):
            plain.append(plain_entry(adapter, f"its scaling matrices do not fit into {old.manifest.dtype}"))
        elif max_error is not None and judged > max_error:
            plain.append(plain_entry(adapter, f"{kind} {judged:.3f} is above {max_error:g}", error))
        else:
            taken.append(i)
    return taken, plain


def _write_rows(
    draft: Draft, old: Collection, kept: Sequence[int], sigma: Tensor, errors: tuple[Tensor, Tensor], wider: int
) -> None:
    """errors: relative ones and those in the collection's metric, [m, S] each, of the new rows."""
    draft.scalings(kept, sigma, wider=wider)
    before = (old.slice_errors(), old.slice_output_errors())
    joined = [
        None if old is None else torch.cat([old[list(kept)], new]) for old, new in zip(before, errors, strict=True)
    ]
    assert joined[0] is not None
    draft.errors(joined[0], joined[1])


def _uncertified(manifest: CollectionManifest) -> CollectionManifest:
    """A certificate holds for the adapters it was computed for."""
    return replace(manifest, error_floor=None, error_reached=None, revision="")
