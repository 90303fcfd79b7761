"""From checked adapters to a collection on disk: fit one slice at a time, resumable, then put the files together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vllm_jdlora.adapter import Adapter, SliceShape, copy_files
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.base_model import of_one_base_model
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.job import ByteLimit, KeptPlain, Options, Progress, job_for
from vllm_jdlora.collection.schema import (
    MANIFEST_FILE,
    QUANTIZATIONS,
)
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.collection.source import common_slices
from vllm_jdlora.collection.tensors import write_tensors
from vllm_jdlora.collection.work import WorkFolder
from vllm_jdlora.errors import JDLoRAError

_SMALL_STACK = 1 << 20


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
        method: ``full`` (Σ is a matrix), ``diag`` (its diagonal), or ``auto``: the one that loses less in
            ``max_bytes``, ``full`` where there is no such choice.
        moments: fit in their metric: least error of outputs for inputs with these second moments, or, where they have
            gradients too, of the loss.
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
    options = Options(rank, clusters, method, moments, max_error, max_bytes, dtype, quantize, seed, effort)
    report = progress or _quiet
    adapters = sorted(adapters, key=lambda a: a.name)
    _, _, base = of_one_base_model(adapters, base_model)
    plain = [KeptPlain(a, f"cannot be compressed: {a.plain_only}") for a in adapters if a.plain_only]
    fitted = [a for a in adapters if not a.plain_only]
    if not fitted:
        raise JDLoRAError(
            f"no adapter can be compressed: {plain[0].adapter.name} has {plain[0].adapter.plain_only}"
            if plain
            else "there are no adapters to compress"
        )
    with threads_for(fitted, common_slices(fitted)):
        job = job_for(fitted, plain, base, options, report)
        with WorkFolder(output, job.digest()) as work, written_atomically(output, MANIFEST_FILE, force=force) as folder:
            work.open(folder)
            fit = job.fit(work, report)
            kept, left = job.sorted_out(fit)
            plain = sorted([*job.plain, *left], key=lambda p: p.adapter.name)
            used = fit.cluster[kept].unique()  # bases of a cluster without members are not stored
            files = write_tensors(folder, job.slices, fit, kept, used, quantize, report)
            for entry in plain:
                copy_files(entry.adapter, folder / "plain" / entry.adapter.name)
            manifest = job.manifest(fit, kept, used, plain, files, skipped)
            (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return Collection.open(output, verify=False)


def _quiet(stage: str, done: int, total: int) -> None:
    pass


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
