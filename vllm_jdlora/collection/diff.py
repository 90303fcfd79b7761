"""What two collections have in common and what they do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.schema import BASES_FILE, CollectionManifest

# Compared apart from the settings, or following from other fields.
_NOT_SETTINGS = ("adapters", "plain", "skipped", "files", "revision", "slices", "error_floor", "error_reached")


@dataclass(frozen=True)
class Change:
    """One adapter before and after: a cluster's number or "plain", a relative error (not squared), or a digest."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class CollectionDiff:
    """From collection A to collection B. ``same`` means equal to the byte of every tensor and every field."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    content: tuple[Change, ...]  # SHA-256 of adapters that were compressed from other files
    moved: tuple[Change, ...]
    errors: tuple[Change, ...]
    output_errors: tuple[Change, ...]  # in the metric that both were fitted in, None where not known; else nothing
    settings: dict[str, tuple[Any, Any]]
    slices_added: tuple[str, ...]
    slices_removed: tuple[str, ...]
    same_bases: bool
    same: bool


def diff(a: Collection, b: Collection) -> CollectionDiff:
    """Compare two collections by their manifests: digests stand for the tensors."""
    before, after = _adapters(a.manifest), _adapters(b.manifest)
    both = sorted(set(before) & set(after))

    def changes(field: str) -> tuple[Change, ...]:
        pairs = [(name, before[name][field], after[name][field]) for name in both]
        return tuple(Change(*pair) for pair in pairs if pair[1] != pair[2])

    first, second = asdict(a.manifest), asdict(b.manifest)
    fields = [key for key in {**first, **second} if key not in _NOT_SETTINGS]
    slices = [{part["name"]: part for part in m["slices"]} for m in (first, second)]
    return CollectionDiff(
        added=tuple(sorted(set(after) - set(before))),
        removed=tuple(sorted(set(before) - set(after))),
        content=changes("sha256"),
        moved=changes("cluster"),
        errors=changes("relative_error"),
        output_errors=changes("output_error") if a.manifest.metric == b.manifest.metric else (),
        settings={key: (first.get(key), second.get(key)) for key in fields if first.get(key) != second.get(key)},
        slices_added=tuple(name for name, part in slices[1].items() if slices[0].get(name) != part),
        slices_removed=tuple(name for name, part in slices[0].items() if slices[1].get(name) != part),
        same_bases=a.manifest.files[BASES_FILE] == b.manifest.files[BASES_FILE],
        same=a.manifest.revision == b.manifest.revision,
    )


def _adapters(manifest: CollectionManifest) -> dict[str, dict[str, Any]]:
    """What is compared of each adapter; a plain one's error is 0, whatever its error would have been compressed."""
    exact = None if manifest.metric == "frobenius" else 0.0
    return {
        **{
            e.name: {field: getattr(e, field) for field in ("sha256", "cluster", "relative_error", "output_error")}
            for e in manifest.adapters
        },
        **{
            p.name: {"sha256": p.sha256, "cluster": "plain", "relative_error": 0.0, "output_error": exact}
            for p in manifest.plain
        },
    }
