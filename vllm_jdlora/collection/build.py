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

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape
from vllm_jdlora.collection.activation import calibration_of, metric_of
from vllm_jdlora.collection.base_model import of_one_base_model
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection, written_atomically
from vllm_jdlora.collection.quantize import cast_of
from vllm_jdlora.collection.schema import (
    MANIFEST_FILE,
    QUANTIZATIONS,
    AdapterEntry,
    CollectionManifest,
    PlainEntry,
    SkippedEntry,
)
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.collection.source import AdapterSource, common_slices, sizes_of
from vllm_jdlora.collection.tensors import write_tensors
from vllm_jdlora.collection.work import WorkFolder
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.budget import Choice, choose_for_bytes, choose_for_error, curves_of
from vllm_jdlora.jd.certificate import certify_clusters
from vllm_jdlora.jd.clustering import CollectionFit, check_settings, fit_collection, probe_positions
from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.search import single_member_clusters
from vllm_jdlora.jd.slice_fit import ScalingOverflow, SliceRecipe
from vllm_jdlora.peft_config import CONFIG_FILE

Progress = Callable[[str, int, int], None]
ByteLimit = Callable[[int], int]
"""Bytes of all adapters uncompressed → bytes that the collection may take."""
_RECIPE = 2
"""Raised when the same adapters and options would be fitted in another way: half-done work of before is not used."""
_SMALL_STACK = 1 << 20


def paper_choice(n: int) -> tuple[int, int]:
    """(rank, clusters) as in the paper (arXiv 2407.00066, §6.5) for n adapters.

    Up to 100 adapters one cluster of rank n/2 + 7; here rounded up to a multiple of 8, at least 16 and at most 64.
    Above, rank 16 and 7, 10 or 25 clusters for up to 128, 256 and more adapters.
    """
    if n <= 100:
        return min(64, max(16, 8 * math.ceil((n / 2 + 7) / 8))), 1
    return 16, 7 if n <= 128 else 10 if n <= 256 else 25


def compress(
    adapters: Sequence[Adapter],
    output: Path,
    *,
    rank: int | None = None,
    clusters: int | None = None,
    method: str = "full",
    moments: SecondMoments | None = None,
    max_error: float | None = None,
    max_bytes: ByteLimit | None = None,
    dtype: str = "bf16",
    quantize: str = "none",
    seed: int = 0,
    effort: float = 1.0,
    base_model: str | None = None,
    force: bool = False,
    skipped: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> Collection:
    """Compress adapters of one base model by joint diagonalisation into the folder ``output``.

    Stopped at any point and called again with the same adapters and options, it goes on from the last finished slice
    (kept beside ``output``) and writes the same bytes.

    Args:
        adapters: checked adapters with different names.
        output: folder to create.
        rank: R. With ``clusters`` left out too, the choice for ``max_bytes`` or ``max_error`` where one of them is
            given, else the paper's for the number of adapters.
        clusters: K, at most the number of adapters.
        method: ``full`` (Σ is a matrix) or ``diag`` (its diagonal).
        moments: fit in the activation metric: least error of outputs for inputs with these second moments.
        max_error: adapters with a larger relative error (of outputs, with ``moments``) are stored uncompressed.
        max_bytes: of bases and scalings, plain adapters included.
        dtype: of bases and scalings on disk: ``bf16``, ``fp16`` or ``fp32``.
        quantize: bases in ``int8`` or ``fp8`` instead; Σ is fitted to the quantised bases.
        seed: of the starts of the clustering; same seed, same files.
        effort: of the search for clusters, see ``jd.search.best_assignment``.
        base_model: name or folder of the base model, for the check that the adapters belong to it.
        force: replace an existing collection at ``output``.
        skipped: (name, reason) of adapters that could not be read, for the record.
        progress: called as (stage, done, total).

    Raises:
        JDLoRAError: nothing can be compressed, adapters do not fit together, a budget cannot be met, or ``output``
            cannot be written.
    """
    if dtype not in TORCH_DTYPES or quantize not in QUANTIZATIONS:
        known = (*TORCH_DTYPES, *QUANTIZATIONS)
        raise JDLoRAError(f"dtype {dtype!r} and quantize {quantize!r} must be of {', '.join(known)}")
    report = progress or _quiet
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
    slices = common_slices(fitted)
    if moments is not None:
        moments.check_fit(slices, base.fingerprint)
    metrics = None if moments is None else metric_of(moments, slices)
    with threads_for(fitted, slices):
        sizes = sizes_of(
            fitted,
            slices,
            dtype_width=TORCH_DTYPES[dtype].itemsize,
            quantize=quantize,
            diagonal=method == "diag",
            always_plain=sum(2 * a.parameters for a, _, _ in plain),
        )
        if rank is None and clusters is None and (max_error is not None or max_bytes is not None):
            curves = curves_of(AdapterSource(fitted, slices), metric_of=metrics, seed=seed, progress=report)
            limit = None if max_bytes is None else max_bytes(sizes.uncompressed)
            choice = _within_budgets(
                choose_for_bytes(curves, sizes, limit)
                if max_error is None and limit is not None
                else choose_for_error(curves, sizes, max_error or 0.0),
                limit,
            )
            rank, clusters = choice.rank, choice.clusters
            reason = f"predicted to be above the error of {max_error or 0:g}"
            plain += [(fitted[i], reason, None) for i in choice.plain]
            fitted = [a for i, a in enumerate(fitted) if i not in choice.plain]
        auto_rank, auto_clusters = paper_choice(len(fitted))
        rank = auto_rank if rank is None else rank
        clusters = min(auto_clusters, len(fitted)) if clusters is None else clusters

        storage = TORCH_DTYPES[dtype]
        recipe = SliceRecipe(rank=rank, method=method, cast=cast_of(quantize, storage), sigma_dtype=storage)
        source = AdapterSource(fitted, slices)
        check_settings(source, clusters)
        digest = _digest(
            fitted,
            slices,
            rank=rank,
            clusters=clusters,
            seed=seed,
            dtype=dtype,
            method=method,
            quantize=quantize,
            effort=effort,
            calibration=None if moments is None else asdict(moments.origin),
        )
        with WorkFolder(output, digest) as work, written_atomically(output, MANIFEST_FILE, force=force) as folder:
            work.open(folder)
            try:
                fit = fit_collection(
                    source,
                    recipe,
                    clusters=clusters,
                    seed=seed,
                    effort=effort,
                    metric_of=metrics,
                    store=work,
                    progress=report,
                )
            except ScalingOverflow as error:
                path = fitted[error.adapter].path
                raise JDLoRAError(f"{path}: its scaling matrices do not fit into {dtype}: give --dtype bf16") from error
            relative = _relative(fit.squared_error, fit.squared_norm)
            output_error = (
                None
                if fit.output_error is None or fit.output_norm is None
                else _relative(fit.output_error, fit.output_norm)
            )
            judged, kind = (relative, "relative") if output_error is None else (output_error, "output")
            alone = _alone(fit.cluster, clusters, fitted, sizes.bases(1, rank) + sizes.scaling(rank))
            kept = []
            for i, adapter in enumerate(fitted):
                if max_error is not None and judged[i] > max_error:
                    reason = f"{kind} error {judged[i]:.3f} is above {max_error:g}"
                    plain.append((adapter, reason, float(relative[i])))
                elif i in alone:
                    reason = f"alone in its cluster: bases of rank {rank} take as many bytes as the adapter itself"
                    plain.append((adapter, reason, float(relative[i])))
                else:
                    kept.append(i)
            if not kept:
                raise JDLoRAError(
                    f"every adapter has {'an' if kind == 'output' else 'a'} {kind} error above {max_error:g} (the "
                    f"best {judged.min():.3f}): give more rank or clusters, or allow more error"
                )
            floor, reached = _certified(Slices(source, metrics), fit, rank, seed) if method == "full" else (None, None)
            used = fit.cluster[kept].unique()  # bases of a cluster without members are not stored
            files = write_tensors(folder, slices, fit, kept, used, quantize, report)
            for adapter, _, _ in plain:
                _copy_plain(adapter, folder / "plain" / adapter.name)
            manifest = CollectionManifest(
                base_model=base,
                method=method,
                rank=rank,
                clusters=len(used),
                metric="frobenius" if moments is None else "activation",
                dtype=dtype,
                seed=seed,
                slices=tuple(slices),
                adapters=tuple(
                    adapter_entry(
                        fitted[i],
                        int(torch.searchsorted(used, fit.cluster[i])),
                        float(relative[i]),
                        None if output_error is None else float(output_error[i]),
                    )
                    for i in kept
                ),
                plain=tuple(
                    PlainEntry(a.name, reason, a.rank, a.parameters, a.sha256, error)
                    for a, reason, error in sorted(plain, key=lambda p: p[0].name)
                ),
                skipped=tuple(SkippedEntry(name, reason) for name, reason in skipped),
                files=files,
                calibration=None if moments is None else calibration_of(moments),
                quantize=quantize,
                max_error=max_error,
                error_floor=floor,
                error_reached=reached,
            )
            (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return Collection.open(output, verify=False)


def _within_budgets(choice: Choice, limit: int | None) -> Choice:
    if limit is not None and choice.bytes > limit:
        raise JDLoRAError(
            f"the error that is asked for takes {choice.bytes} bytes, more than the {limit} allowed: give up one of "
            "--max-error and --max-bytes"
        )
    return choice


def _alone(cluster: torch.Tensor, clusters: int, adapters: Sequence[Adapter], basis_bytes: int) -> set[int]:
    """Positions of adapters that are the only one of their cluster and take no more bytes than its bases and Σ."""
    positions = (cluster == torch.tensor(single_member_clusters(cluster, clusters))[:, None]).any(0).nonzero()[:, 0]
    found = {i for i in positions.tolist() if 2 * adapters[i].parameters <= basis_bytes}
    return found if len(found) < len(adapters) else set()


def _relative(squared_error: torch.Tensor, squared_norm: torch.Tensor) -> torch.Tensor:
    """[n] relative error (not squared) over all slices, from both squares [n, S]."""
    return (squared_error.sum(1) / squared_norm.sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()


def _certified(slices: Slices, fit: CollectionFit, rank: int, seed: int) -> tuple[float | None, float | None]:
    """(floor, reached) root mean squares on the probe slices; None where these are too large for a certificate."""
    positions = probe_positions(len(slices), seed)
    bounds = certify_clusters((slices[index] for index in positions), fit.cluster, rank)
    if bounds is None:
        return None, None
    reached = sum(float(fit.slice(index).relative().sum()) for index in positions)
    return bounds.relative[0], (reached / max(bounds.weight, 1.0)) ** 0.5


def _quiet(stage: str, done: int, total: int) -> None:
    pass


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
def threads_for(adapters: Sequence[Adapter], slices: Sequence[SliceShape]) -> Iterator[None]:
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


def adapter_entry(adapter: Adapter, cluster: int, error: float, output_error: float | None = None) -> AdapterEntry:
    """What the manifest says of a compressed adapter."""
    scales = {part.scale for part in adapter.slices.values()}
    return AdapterEntry(
        name=adapter.name,
        cluster=cluster,
        relative_error=error,
        rank=adapter.rank,
        scale=scales.pop() if len(scales) == 1 else None,
        parameters=adapter.parameters,
        sha256=adapter.sha256,
        output_error=output_error,
    )


def _copy_plain(adapter: Adapter, target: Path) -> None:
    target.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter.path / name, target / name)
