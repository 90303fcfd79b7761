"""The servers of Figure 1: what a point needs on disk, and the arguments of ``vllm serve`` that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from bench_rows import TARGETS
from figure1_points import RANK, SERIES, Point
from synthetic_collections import write_adapters, write_collection

from vllm_jdlora.adapter import Adapter, read_adapters
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress

BASE = "base"
_KIND = {series.key: series for series in SERIES}


@dataclass(frozen=True)
class Engine:
    """What all servers of a run share.

    Attributes:
        model: folder of the base model.
        dtype: of the model.
        batch: requests that run at once.
        max_tokens: of a prompt and its answer.
        kv_cache_bytes: the same for all, enough for a whole batch: how little would be left is not what is compared.
    """

    model: Path
    dtype: str
    batch: int
    max_tokens: int
    kv_cache_bytes: int

    def arguments(self) -> list[str]:
        return [
            str(self.model),
            f"--served-model-name={BASE}",
            f"--dtype={self.dtype}",
            f"--max-model-len={self.max_tokens}",
            f"--max-num-seqs={self.batch}",
            f"--max-num-batched-tokens={max(2048, self.max_tokens)}",
            f"--kv-cache-memory-bytes={self.kv_cache_bytes}",
            "--no-enable-prefix-caching",
            "--uvicorn-log-level=warning",
        ]


@dataclass(frozen=True)
class Served:
    """A server to be started.

    Attributes:
        arguments: what follows ``vllm serve``.
        adapters: names to ask for.
        real: trained adapters, not random ones.
        error: of a collection of real adapters, mean and largest relative error ‖ΔW − UΣV‖ / ‖ΔW‖.
    """

    arguments: list[str]
    adapters: list[str]
    real: bool
    error: dict[str, float] | None = None


@dataclass
class Provisions:
    """Makes what a point needs, once, in a scratch folder.

    Real adapters are used for points with no more adapters than there are; random ones of the same shapes, whose speed
    is the same, for the others.
    """

    scratch: Path
    engine: Engine
    real_adapters: Path | None
    targets: str = "attention"
    _synthetic: list[Path] = field(default_factory=list)

    def served(self, point: Point, most: int) -> Served:
        """`most`: the largest number of uncompressed adapters of the whole run; they are written at once."""
        series = _KIND[point.series]
        arguments = self.engine.arguments()
        if series.kind == "compressed":
            collection, real = self._collection(point, series.quantize)
            entries = collection.manifest.adapters
            errors = [entry.relative_error for entry in entries]
            error = {"mean": round(fmean(errors), 4), "max": round(max(errors), 4)} if real else None
            # Room for plain adapters of higher rank would widen the bases.
            sizes = [f"--max-lora-rank={point.rank}"]
            arguments += ["--lora-compression=jd", f"--lora-collection={collection.path}", *sizes]
            return Served(arguments, sorted(entry.name for entry in entries), real, error)
        folders, real = self._folders(point.adapters, most)
        modules = ["--lora-modules", *(f"{folder.name}={folder}" for folder in folders)]
        sizes = [f"--max-loras={point.slots}", f"--max-cpu-loras={point.adapters}"]
        if series.kind == "plain":
            # A collection of one adapter that no request names: nothing that is measured is compressed.
            unused = self._unused()
            arguments += ["--lora-compression=jd", f"--lora-collection={unused.path}", *sizes, *modules]
        else:
            arguments += ["--enable-lora", f"--max-lora-rank={RANK}", *sizes, *modules]
            if series.told:
                arguments += ["--lora-target-modules", *TARGETS[self.targets]]
        return Served(arguments, sorted(folder.name for folder in folders), real)

    def _collection(self, point: Point, quantize: str) -> tuple[Collection, bool]:
        adapters, clusters, rank = point.adapters, point.clusters, point.rank
        path = self.scratch / f"collection-{adapters}-{clusters}-{rank}-{quantize}"
        real = self._real[:adapters] if adapters <= len(self._real) else []
        if path.exists():
            return Collection.open(path, verify=False), bool(real)
        if real:
            return compress(real, path, rank=rank, clusters=clusters, quantize=quantize), True
        return self._random_collection(path, adapters, clusters, rank, quantize), False

    def _unused(self) -> Collection:
        path = self.scratch / "collection-unused"
        if path.exists():
            return Collection.open(path, verify=False)
        return self._random_collection(path, 1, 1, RANK, "none")

    def _random_collection(self, path: Path, adapters: int, clusters: int, rank: int, quantize: str) -> Collection:
        return write_collection(
            path,
            self.engine.model,
            TARGETS[self.targets],
            adapters=adapters,
            clusters=clusters,
            rank=rank,
            quantize=quantize,
        )

    def _folders(self, adapters: int, most: int) -> tuple[Sequence[Path], bool]:
        if adapters <= len(self._real):
            return [adapter.path for adapter in self._real[:adapters]], True
        if len(self._synthetic) < adapters:
            folder = self.scratch / f"adapters-{max(adapters, most)}"
            targets = TARGETS[self.targets]
            count = max(adapters, most)
            self._synthetic = write_adapters(folder, self.engine.model, targets, adapters=count, rank=RANK)
        return self._synthetic[:adapters], False

    @cached_property
    def _real(self) -> list[Adapter]:
        return read_adapters([self.real_adapters])[0] if self.real_adapters else []
