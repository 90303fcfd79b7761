"""A finished fit as a collection's tensor files, streamed: never more than a slice or a piece of Σ in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.quantize import STORED, quantized
from vllm_jdlora.collection.schema import BASES_FILE, ERRORS_FILE, scalings_file
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.jd.clustering import CollectionFit

_SHARD_BYTES = 1 << 30
_PIECE_BYTES = 1 << 26


def write_tensors(
    folder: Path,
    slices: Sequence[SliceShape],
    fit: CollectionFit,
    kept: Sequence[int],
    used: Tensor,
    quantize: str,
    report: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Bases of the clusters `used`, Σ and errors of the adapters `kept` (positions in the fit); file → SHA-256."""
    first = fit.slice(0)
    total = len(slices) + len(kept)
    files = {}

    def bases() -> Iterator[Tensor]:
        for index in range(len(slices)):
            yield from as_stored(fit.slice(index).u[used], fit.slice(index).v[used], quantize)
            report("write", index + 1, total)

    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    clusters, rank = len(used), first.u.shape[2]
    dtype = STORED.get(quantize, first.u.dtype)
    for part in slices:
        layout[f"{part.name}.U"] = (dtype, (clusters, part.d_out, rank))
        layout[f"{part.name}.V"] = (dtype, (clusters, rank, part.d_in))
        if quantize != "none":
            layout |= {f"{part.name}.{side}_scale": (torch.float32, (clusters, rank)) for side in "UV"}
    files[BASES_FILE] = write_streamed(folder / BASES_FILE, layout, bases())

    def rows(begin: int, end: int) -> Iterator[Tensor]:
        for at in range(begin, end, piece):
            chosen = torch.tensor(kept[at : min(end, at + piece)])
            yield torch.stack([fit.slice(index).sigma[chosen] for index in range(len(slices))], 1)
            report("write", len(slices) + at + len(chosen), total)

    sigma = first.sigma
    row_bytes = len(slices) * sigma[0].numel() * sigma.element_size()
    shard, piece = (max(1, limit // row_bytes) for limit in (_SHARD_BYTES, _PIECE_BYTES))
    for number, begin in enumerate(range(0, len(kept), shard)):
        end = min(len(kept), begin + shard)
        name = scalings_file(number)
        shape = (end - begin, len(slices), *sigma.shape[1:])
        files[name] = write_streamed(folder / name, {"sigma": (sigma.dtype, shape)}, rows(begin, end))
    errors = {"relative_error": (fit.squared_error[kept] / fit.squared_norm[kept]).sqrt().float()}
    if fit.output_error is not None and fit.output_norm is not None:
        errors["output_error"] = (fit.output_error[kept] / fit.output_norm[kept]).sqrt().float()
    layout = {name: (error.dtype, tuple(error.shape)) for name, error in errors.items()}
    files[ERRORS_FILE] = write_streamed(folder / ERRORS_FILE, layout, errors.values())
    return files


def as_stored(u: Tensor, v: Tensor, quantize: str) -> list[Tensor]:
    """What the file holds of one slice's bases, whose values are as stored already: U, V and, in 8 bits, scales."""
    if quantize == "none":
        return [u, v]
    (steps_u, scale_u), (steps_v, scale_v) = quantized(u.mT, quantize), quantized(v, quantize)
    return [steps_u.mT.contiguous(), steps_v, scale_u, scale_v]
