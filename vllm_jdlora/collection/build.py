"""From checked adapters to a collection on disk: fit, measure what is stored, write."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape, file_digest
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
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.clustering import CollectionFit, fit_collection
from vllm_jdlora.jd.problem import Factors, squared_error, squared_norm
from vllm_jdlora.peft_config import CONFIG_FILE

Progress = Callable[[str, int, int], None]
_SHARD_BYTES = 1 << 30
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

    with written_atomically(output, MANIFEST_FILE, force=force) as folder:
        source = _AdapterSource(fitted, slices)
        with _threads_for(fitted, slices):
            fit = fit_collection(
                source, rank=rank, clusters=clusters, seed=seed, dtype=TORCH_DTYPES[dtype], progress=progress
            )
        sigma = fit.sigma.to(TORCH_DTYPES[dtype])
        fits = sigma.isfinite().flatten(1).all(1)
        if not fits.all():
            too_large = fitted[int(fits.int().argmin())].path
            raise JDLoRAError(f"{too_large}: its scaling matrices do not fit into {dtype}: give --dtype bf16")
        norms, errors = _measure(source, fit, sigma, progress)
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
        files = _write_tensors(folder, slices, fit, sigma[kept], (errors[kept] / norms[kept]).sqrt().float())
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


def _measure(
    source: _AdapterSource, fit: CollectionFit, sigma: torch.Tensor, progress: Progress | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norms and squared errors [n, slices] in fp64, for bases and scalings exactly as they are stored."""
    norms = torch.zeros(sigma.shape[:2], dtype=torch.float64)
    errors = torch.zeros_like(norms)
    for m in range(sigma.shape[1]):
        if progress:
            progress("measure", m, sigma.shape[1])
        for i, factors in enumerate(source.factors(m)):
            if factors is not None:
                k = fit.cluster[i]
                norms[i, m] = squared_norm(factors.b, factors.a)
                errors[i, m] = squared_error(factors.b, factors.a, fit.u[m][k], sigma[i, m], fit.v[m][k])
    if progress:
        progress("measure", sigma.shape[1], sigma.shape[1])
    return norms, errors


def _write_tensors(
    folder: Path, slices: Sequence[SliceShape], fit: CollectionFit, sigma: torch.Tensor, errors: torch.Tensor
) -> dict[str, str]:
    bases = {}
    for part, u, v in zip(slices, fit.u, fit.v, strict=True):
        bases[f"{part.name}.U"] = u.contiguous()
        bases[f"{part.name}.V"] = v.contiguous()
    tensors = {BASES_FILE: bases, ERRORS_FILE: {"relative_error": errors}}
    rows = max(1, _SHARD_BYTES // (sigma[0].numel() * sigma.element_size()))
    for shard, start in enumerate(range(0, len(sigma), rows)):
        tensors[scalings_file(shard)] = {"sigma": sigma[start : start + rows].contiguous()}
    for name, content in tensors.items():
        save_file(content, folder / name)
    return {name: file_digest(folder / name) for name in tensors}


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
