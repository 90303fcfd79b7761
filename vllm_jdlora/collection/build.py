"""From checked adapters to a collection on disk: fit one slice at a time, resumable, then put the files together."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape
from vllm_jdlora.collection.base_model import of_one_base_model
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection, written_atomically
from vllm_jdlora.collection.schema import (
    BASES_FILE,
    ERRORS_FILE,
    MANIFEST_FILE,
    AdapterEntry,
    CollectionManifest,
    PlainEntry,
    SkippedEntry,
    scalings_file,
)
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.collection.work import WorkFolder
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.clustering import CollectionFit, check_settings, fit_collection
from vllm_jdlora.jd.problem import Factors
from vllm_jdlora.jd.slice_fit import ScalingOverflow, SliceRecipe
from vllm_jdlora.peft_config import CONFIG_FILE

Progress = Callable[[str, int, int], None]
_RECIPE = 1
"""Raised when the same adapters and options would be fitted in another way: half-done work of before is not used."""
_SHARD_BYTES = 1 << 30
_PIECE_BYTES = 1 << 26
_SMALL_STACK = 1 << 20


def paper_choice(n: int) -> tuple[int, int]:
    """(rank, clusters) as in the paper (arXiv 2407.00066, §6.5) for n adapters.

    Up to 100 adapters one cluster of rank n/2 + 7; here rounded up to a multiple of 8, at least 16 and at most 64.
    Above, rank 16 and 7, 10 or 25 clusters for up to 128, 256 and more adapters.
    """
    if n <= 100:
        return min(64, max(16, 8 * math.ceil((n / 2 + 7) / 8))), 1
    return 16, 7 if n <= 128 else 10 if n <= 256 else 25


class _AdapterSource:
    """The adapters as `jd` wants them: factors of one slice at a time, read from disk when asked for."""

    def __init__(self, adapters: Sequence[Adapter], slices: Sequence[SliceShape]):
        self._adapters = adapters
        self.slice_names = [s.name for s in slices]

    @property
    def n(self) -> int:
        return len(self._adapters)

    def factors(self, slice_index: int) -> list[Factors | None]:
        name = self.slice_names[slice_index]
        pairs = [adapter.factors(name) for adapter in self._adapters]
        return [None if pair is None else Factors(*pair) for pair in pairs]


def compress(
    adapters: Sequence[Adapter],
    output: Path,
    *,
    rank: int | None = None,
    clusters: int | None = None,
    seed: int = 0,
    max_error: float | None = None,
    dtype: str = "bf16",
    base_model: str | None = None,
    force: bool = False,
    skipped: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> Collection:
    """Compress adapters of one base model by JD-Full into the folder ``output``.

    Stopped at any point and called again with the same adapters and options, it goes on from the last finished slice
    (kept beside ``output``) and writes the same bytes.

    Args:
        adapters: checked adapters with different names.
        output: folder to create.
        rank: R; with ``clusters`` left out too, the paper's choice for the number of adapters.
        clusters: K, at most the number of adapters.
        seed: of the starts of the clustering; same seed, same files.
        max_error: adapters with a relative error above it are stored uncompressed.
        dtype: of bases and scalings on disk: ``bf16``, ``fp16`` or ``fp32``.
        base_model: name or folder of the base model, for the check that the adapters belong to it.
        force: replace an existing collection at ``output``.
        skipped: (name, reason) of adapters that could not be read, for the record.
        progress: called as (stage, done, total).

    Raises:
        JDLoRAError: nothing can be compressed, adapters do not fit together, or ``output`` cannot be written.
    """
    if dtype not in TORCH_DTYPES:
        raise JDLoRAError(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    adapters = sorted(adapters, key=lambda a: a.name)
    _, _, base = of_one_base_model(adapters, base_model)
    plain: list[tuple[Adapter, str, float | None]] = [
        (a, f"cannot be compressed: {a.plain_only}", None) for a in adapters if a.plain_only
    ]
    fitted = [a for a in adapters if not a.plain_only]
    if not fitted:
        raise JDLoRAError(
            f"no adapter can be compressed: {plain[0][0].name} has {plain[0][0].plain_only}"
            if plain
            else "there are no adapters to compress"
        )
    slices = _common_slices(fitted)
    auto_rank, auto_clusters = paper_choice(len(fitted))
    rank = auto_rank if rank is None else rank
    clusters = min(auto_clusters, len(fitted)) if clusters is None else clusters

    storage = TORCH_DTYPES[dtype]
    recipe = SliceRecipe(rank=rank, cast=lambda basis: basis.to(storage), sigma_dtype=storage)
    source = _AdapterSource(fitted, slices)
    check_settings(source, clusters)
    digest = _digest(fitted, slices, rank=rank, clusters=clusters, seed=seed, dtype=dtype)
    with WorkFolder(output, digest) as work, written_atomically(output, MANIFEST_FILE, force=force) as folder:
        work.open(folder)
        with _threads_for(fitted, slices):
            try:
                fit = fit_collection(source, recipe, clusters=clusters, seed=seed, store=work, progress=progress)
            except ScalingOverflow as error:
                path = fitted[error.adapter].path
                raise JDLoRAError(f"{path}: its scaling matrices do not fit into {dtype}: give --dtype bf16") from error
        norms, errors = fit.squared_norm, fit.squared_error
        relative = (errors.sum(1) / norms.sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        kept = [i for i in range(len(fitted)) if max_error is None or relative[i] <= max_error]
        for i in sorted(set(range(len(fitted))) - set(kept)):
            reason = f"relative error {relative[i]:.3f} is above {max_error:g}"
            plain.append((fitted[i], reason, float(relative[i])))
        if not kept:
            raise JDLoRAError(
                f"every adapter has a relative error above {max_error:g} (the best {relative.min():.3f}): give more "
                "rank or clusters, or allow more error"
            )
        files = write_tensors(folder, slices, fit, kept, progress)
        for adapter, _, _ in plain:
            _copy_plain(adapter, folder / "plain" / adapter.name)
        manifest = CollectionManifest(
            base_model=base,
            method="full",
            rank=rank,
            clusters=clusters,
            metric="frobenius",
            dtype=dtype,
            seed=seed,
            slices=tuple(slices),
            adapters=tuple(_adapter_entry(fitted[i], int(fit.cluster[i]), float(relative[i])) for i in kept),
            plain=tuple(
                PlainEntry(a.name, reason, a.rank, a.parameters, a.sha256, error)
                for a, reason, error in sorted(plain, key=lambda p: p[0].name)
            ),
            skipped=tuple(SkippedEntry(name, reason) for name, reason in skipped),
            files=files,
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return Collection.open(output, verify=False)


def _digest(adapters: Sequence[Adapter], slices: Sequence[SliceShape], **options: object) -> str:
    """What the fit depends on: work under another digest is not gone on with. (Not `max_error`, nor what is plain.)"""
    recipe = {
        "recipe": _RECIPE,
        "versions": [version("vllm-jdlora"), torch.__version__],
        "adapters": [(a.name, a.sha256) for a in adapters],
        "slices": [asdict(part) for part in slices],
        **options,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


@contextmanager
def _threads_for(adapters: Sequence[Adapter], slices: Sequence[SliceShape]) -> Iterator[None]:
    """One thread while the stacked factors of a slice are small.

    Their products take microseconds: a second thread gains nothing, and where other processes want the cores too,
    waiting for it made eight adapters take 22 to 67 s instead of 3.
    """
    before = torch.get_num_threads()
    if sum(a.rank for a in adapters) * max(max(s.d_out, s.d_in) for s in slices) < _SMALL_STACK:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_tensors(
    folder: Path, slices: Sequence[SliceShape], fit: CollectionFit, kept: Sequence[int], progress: Progress | None
) -> dict[str, str]:
    """Bases, scalings and errors of the adapters `kept` (positions in the fit), streamed; file → SHA-256."""
    report = progress or _quiet
    first = fit.slice(0)
    files = {}

    def bases() -> Iterator[Tensor]:
        for index in range(len(slices)):
            part = fit.slice(index)
            yield part.u
            yield part.v
            report("write", index + 1, len(slices) + len(kept))

    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for part in slices:
        layout[f"{part.name}.U"] = (first.u.dtype, (len(first.u), part.d_out, first.u.shape[2]))
        layout[f"{part.name}.V"] = (first.v.dtype, (len(first.v), first.v.shape[1], part.d_in))
    files[BASES_FILE] = write_streamed(folder / BASES_FILE, layout, bases())

    def rows(begin: int, end: int) -> Iterator[Tensor]:
        for at in range(begin, end, piece):
            chosen = torch.tensor(kept[at : min(end, at + piece)])
            yield torch.stack([fit.slice(index).sigma[chosen] for index in range(len(slices))], 1)
            report("write", len(slices) + at + len(chosen), len(slices) + len(kept))

    sigma = first.sigma
    row_bytes = len(slices) * sigma[0].numel() * sigma.element_size()
    shard, piece = (max(1, limit // row_bytes) for limit in (_SHARD_BYTES, _PIECE_BYTES))
    for number, begin in enumerate(range(0, len(kept), shard)):
        end = min(len(kept), begin + shard)
        name = scalings_file(number)
        shape = (end - begin, len(slices), *sigma.shape[1:])
        files[name] = write_streamed(folder / name, {"sigma": (sigma.dtype, shape)}, rows(begin, end))
    errors = (fit.squared_error[kept] / fit.squared_norm[kept]).sqrt().float()
    layout = {"relative_error": (errors.dtype, tuple(errors.shape))}
    files[ERRORS_FILE] = write_streamed(folder / ERRORS_FILE, layout, [errors])
    return files


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def _adapter_entry(adapter: Adapter, cluster: int, error: float) -> AdapterEntry:
    scales = {part.scale for part in adapter.slices.values()}
    return AdapterEntry(
        name=adapter.name,
        cluster=cluster,
        relative_error=error,
        rank=adapter.rank,
        scale=scales.pop() if len(scales) == 1 else None,
        parameters=adapter.parameters,
        sha256=adapter.sha256,
    )


def _copy_plain(adapter: Adapter, target: Path) -> None:
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter.path / name, target / name)


def _common_slices(adapters: Sequence[Adapter]) -> list[SliceShape]:
    """Every slice that any adapter has, in the model's order; all adapters must agree on its shape."""
    shapes: dict[str, tuple[SliceShape, str]] = {}
    for adapter in adapters:
        for name, part in adapter.slices.items():
            known, owner = shapes.setdefault(name, (part.shape, adapter.name))
            if known != part.shape:
                raise JDLoRAError(
                    f"{adapter.path / WEIGHTS_FILE}: {name} is {part.shape.d_out} x {part.shape.d_in}, in {owner} it "
                    f"is {known.d_out} x {known.d_in}: they belong to different base models, compress them apart"
                )
    return [shapes[name][0] for name in sorted(shapes, key=_model_order)]


def _model_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 after layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
