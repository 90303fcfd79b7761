"""The revisions of a collection that a worker serves at once, on the same bases or on others, and where an adapter's Σ
lies.

The newest revision is what new requests get. Older ones stay open for requests that still run: a path names its
revision, so such a request keeps the Σ that it was admitted with, whatever has become of the folder.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.arrival_file import read_arrival
from vllm_jdlora.collection.schema import MANIFEST_FILE, CollectionManifest
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_directory import CompressedAdapter
from vllm_jdlora.serving.options import AdapterPath

KEPT = 4
"""Revisions before the newest that are never dropped."""

GRACE_SECONDS = 600.0
"""How long after it was superseded a revision is kept at least: longer than a request waits and runs."""


def open_revision(path: str | Path, revision: str) -> Collection:
    """Open a collection whose files stay what they are now, even when the folder is replaced.

    Args:
        path: the folder.
        revision: that it must have.

    Raises:
        JDLoRAError: it has another one, cannot be read, or is replaced just now.
    """
    for _ in range(3):
        before = manifest_identity(path)
        collection = Collection.open(path, verify=False)
        found = collection.manifest.revision
        if found != revision:
            raise JDLoRAError(
                f"{path} is revision {found} and not {revision}: the collection was replaced meanwhile, load it again"
            )
        if before is not None and manifest_identity(path) == before:
            return collection
    raise JDLoRAError(f"{path} is being replaced again and again: load it again when it is at rest")


@dataclass(frozen=True, eq=False)
class _Bases:
    """What revisions that share their bases have in common.

    Attributes:
        manifest: of the first of them.
        numbers: by which the worker knows the bases, that of cluster k the k-th.
    """

    manifest: CollectionManifest
    numbers: range


class CollectionRevisions:
    """What the paths of compressed adapters mean.

    Attributes:
        newest: the collection that was loaded last.
    """

    def __init__(
        self,
        collection: Collection,
        arrivals: str = "",
        *,
        kept: int = KEPT,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            collection: the first one.
            arrivals: folder of adapters that come while the server runs; empty for none.
            kept: older revisions that are never dropped.
            grace_seconds: least time from a revision's end to its dropping.
            clock: seconds.
        """
        self._arrivals = arrivals
        self._kept, self._grace, self._clock = kept, grace_seconds, clock
        self.replace(collection)

    def __len__(self) -> int:
        return len(self._collections)

    def __contains__(self, revision: str) -> bool:
        return revision in self._collections

    def replace(self, collection: Collection) -> None:
        """Serve a collection with other bases; every revision before is unknown from now on."""
        self._collections: dict[str, Collection] = {}
        self._superseded: dict[str, float] = {}
        # Also of revisions that were dropped: arrivals on their bases are on those of a later one.
        self._bases_of: dict[str, _Bases] = {}
        self._bases = _Bases(collection.manifest, range(collection.manifest.clusters))
        self.newest = collection
        self._enter(collection)

    def add(self, collection: Collection) -> None:
        """Serve a collection with the same bases from now on, and the others to those who ask for them."""
        self._superseded.setdefault(self.newest.manifest.revision, self._clock())
        self._enter(collection)

    def add_beside(self, collection: Collection, numbers: range) -> None:
        """The same for a collection with other bases, which have these numbers."""
        self._superseded.setdefault(self.newest.manifest.revision, self._clock())
        self._bases = _Bases(collection.manifest, numbers)
        self._enter(collection)

    def drop_other_bases(self) -> tuple[list[str], list[range]]:
        """Forget all revisions whose bases are not the newest one's; they, and the numbers of those bases."""
        gone = [revision for revision, bases in self._bases_of.items() if bases is not self._bases]
        numbers = {id(self._bases_of[revision]): self._bases_of[revision].numbers for revision in gone}
        for revision in gone:
            del self._bases_of[revision]
            self._collections.pop(revision, None)
            self._superseded.pop(revision, None)
        return gone, list(numbers.values())

    def _enter(self, collection: Collection) -> None:
        revision = collection.manifest.revision
        self._superseded.pop(revision, None)
        self._collections.pop(revision, None)  # one that comes back becomes the newest
        self._collections[revision] = collection
        self._bases_of[revision] = self._bases
        self.newest = collection

    def drop_old(self, in_use: set[str]) -> list[str]:
        """Close revisions that are far back, ended long ago and are not in use; their names."""
        old = list(self._collections)[: -1 - self._kept]
        now = self._clock()
        dropped = [r for r in old if r not in in_use and now - self._superseded[r] >= self._grace]
        for revision in dropped:
            del self._collections[revision], self._superseded[revision]
        return dropped

    def adapter(self, path: AdapterPath) -> CompressedAdapter:
        """What a path means; for an arrival its file is read.

        Raises:
            JDLoRAError: the revision, the adapter or the arrival is not known here.
        """
        manifest = self.newest.manifest
        bases = self._bases_of.get(path.revision)
        if bases is None:
            raise JDLoRAError(
                f"adapter {path.name!r} is asked for from revision {path.revision} and this server has "
                f"{manifest.revision}: take the request from the collection that the server serves now"
            )
        if path.arrival:
            return self._arrival(path, bases)
        collection = self._collections.get(path.revision)
        if collection is None:
            raise JDLoRAError(
                f"adapter {path.name!r} is asked for from revision {path.revision}, which was replaced by "
                f"{manifest.revision} long ago: take the request from the collection that the server serves now"
            )
        row = collection.index_of(path.name)
        self._check_cluster(path, collection.manifest.adapters[row].cluster)
        read = functools.partial(collection.sigma, row)
        return CompressedAdapter(str(path), path.name, path.revision, bases.numbers[path.cluster], read)

    def _arrival(self, path: AdapterPath, bases: _Bases) -> CompressedAdapter:
        if not self._arrivals:
            raise JDLoRAError(f"adapter {path.name!r} came at run time, and this server takes no such adapters")
        if path.cluster >= len(bases.numbers):
            self._check_cluster(path, len(bases.numbers) - 1)
        sigma = read_arrival(Path(self._arrivals), path.arrival, bases.manifest)
        number = bases.numbers[path.cluster]
        return CompressedAdapter(str(path), path.name, path.revision, number, lambda: sigma, arrival=True)

    def _check_cluster(self, path: AdapterPath, cluster: int) -> None:
        if path.cluster != cluster:
            raise JDLoRAError(f"adapter {path.name!r} is asked for from cluster {path.cluster} and lies in {cluster}")


def manifest_identity(path: str | Path) -> tuple[int, int] | None:
    """Of the manifest's file: another one in its place has another. ``None`` where there is none."""
    try:
        found = os.stat(Path(path) / MANIFEST_FILE)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
