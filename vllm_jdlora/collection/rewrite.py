"""A changed collection on disk: what stays the same is linked or copied, the rest is written, then it is swapped in.

The one place that knows how edited collections are stored; `build` writes new ones.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape, copy_files, file_digest
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.job import adapter_entry
from vllm_jdlora.collection.schema import (
    BASES_FILE,
    ERRORS_FILE,
    MANIFEST_FILE,
    AdapterEntry,
    BaseModel,
    CollectionManifest,
    PlainEntry,
    scalings_file,
)
from vllm_jdlora.collection.source import common_slices
from vllm_jdlora.collection.tensors import as_stored
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE

__all__ = [
    "Draft",
    "adapter_entry",
    "common_slices",
    "open_for_editing",
    "plain_entry",
    "require_undamaged",
    "rewritten",
    "write_new",
]

_SHARD_BYTES = 1 << 30


@contextmanager
def open_for_editing(path: Path) -> Iterator[Collection]:
    """The collection, locked: two edits of one folder at a time would lose the first one's work.

    Raises:
        JDLoRAError: it is no readable collection.
    """
    path = Path(path)
    Collection.open(path, verify=False)  # the usual message for what is no collection
    while True:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The edit that held the lock has put another folder in this place: lock that one.
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                yield Collection.open(path, verify=False)
                return
        finally:
            os.close(lock)


class Draft:
    """The folder in the making. ``old`` is the collection that unchanged files come from, if any do."""

    def __init__(self, folder: Path, old: Collection | None, *, in_place: bool):
        self.folder = folder
        self.files: dict[str, str] = {}
        self._source = old
        # Hard links only where the old folder goes away: two living collections must not share bytes.
        self._in_place = in_place

    @property
    def _old(self) -> Collection:
        assert self._source is not None, "a collection that is new has nothing to keep"
        return self._source

    def keep(self, name: str) -> None:
        """Take one tensor file as it is; its digest is known."""
        self._take(self._old.path / name, self.folder / name)
        self.files[name] = self._old.manifest.files[name]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name)
        self.files[name] = file_digest(self.folder / name)

    def keep_plain(self, name: str) -> None:
        """Take the folder of an adapter that is kept uncompressed."""
        target = self.folder / "plain" / name
        target.mkdir(parents=True)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            self._take(self._old.plain_path(name) / file, target / file)

    def add_plain(self, adapter: Adapter) -> None:
        copy_files(adapter, self.folder / "plain" / adapter.name)

    def bases(self, slices: Sequence[SliceShape], bases: Sequence[tuple[Tensor, Tensor]], quantize: str) -> None:
        """(U [K, d_out, R], V [K, R, d_in]) of each slice, with values as stored: in the stored dtype, or rounded to
        what `quantize` can hold."""
        tensors: dict[str, Tensor] = {}
        for part, pair in zip(slices, bases, strict=True):
            names = [f"{part.name}.{side}" for side in ("U", "V", "U_scale", "V_scale")]
            tensors |= zip(names, as_stored(*pair, quantize), strict=False)
        self.save(BASES_FILE, tensors)

    def errors(self, relative: Tensor, output: Tensor | None = None) -> None:
        """[n, slices] fp32, NaN where an adapter has nothing; `output` for collections in the activation metric."""
        self.save(ERRORS_FILE, {"relative_error": relative} | ({} if output is None else {"output_error": output}))

    def scalings(self, kept: Sequence[int], new: Tensor, *, wider: int = 0) -> None:
        """The old rows `kept` (ascending), then the rows `new` [m, slices, …]; shards that do not change are kept.

        wider: rows and columns of zeros that each old scaling matrix gets.
        """
        shards = sorted(name for name in self._old.manifest.files if name.startswith("scalings-"))
        row_bytes = new[0].numel() * new.element_size() if len(new) else self._row_bytes(wider)
        sizes = [self._rows_of(name) for name in shards]
        # Reading assumes equal shards but for the last: a full first shard says how large they are.
        full = len(shards) > 1 and not wider
        rows = sizes[0] if full else max(1, _SHARD_BYTES // row_bytes)
        checked: set[str] = set()
        for shard, first in enumerate(range(0, len(kept) + len(new), rows)):
            name = scalings_file(shard)
            old = list(kept[first : first + rows])
            added = new[max(0, first - len(kept)) : max(0, first + rows - len(kept))]
            if name in shards and not wider and not len(added):
                start = sum(sizes[:shard])
                if old == list(range(start, start + sizes[shard])):
                    self.keep(name)
                    continue
            sources = {shards[row // sizes[0]] for row in old} - checked
            require_undamaged(self._old, sorted(sources))
            checked |= sources
            self.save(name, {"sigma": torch.stack([*(_widened(self._old.sigma(row), wider) for row in old), *added])})

    def all_scalings(self, sigma: Tensor) -> None:
        """Every row [n, slices, …] anew."""
        rows = max(1, _SHARD_BYTES // (sigma[0].numel() * sigma.element_size()))
        for shard, first in enumerate(range(0, len(sigma), rows)):
            self.save(scalings_file(shard), {"sigma": sigma[first : first + rows]})

    def seal(self, manifest: CollectionManifest) -> None:
        (self.folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")

    def _rows_of(self, name: str) -> int:
        with safe_open(self._old.path / name, framework="pt") as file:
            return int(file.get_slice("sigma").get_shape()[0])

    def _row_bytes(self, wider: int) -> int:
        sigma = _widened(self._old.sigma(0), wider)
        return sigma.numel() * sigma.element_size()

    def _take(self, source: Path, target: Path) -> None:
        # The swap sets modes, which only a file's owner may.
        if self._in_place and source.stat().st_uid == os.geteuid():
            try:
                os.link(source, target)
                return
            except OSError:  # a file system without links
                pass
        shutil.copyfile(source, target)


@contextmanager
def rewritten(old: Collection, output: Path | None, *, force: bool = False) -> Iterator[Draft]:
    """A draft that becomes ``output`` (None: takes the place of ``old``) when the block ends well.

    Raises:
        JDLoRAError: a file that goes into the new one is damaged, or the disk refuses; nothing was changed then.
    """
    target = old.path if output is None else Path(output)
    with written_atomically(target, MANIFEST_FILE, force=force or output is None) as folder:
        yield Draft(folder, old, in_place=output is None)


def plain_entry(adapter: Adapter, reason: str, error: float | None = None) -> PlainEntry:
    return PlainEntry(adapter.name, reason, adapter.rank, adapter.parameters, adapter.sha256, error)


def write_new(
    folder: Path,
    *,
    base_model: BaseModel,
    dtype: str,
    slices: Sequence[SliceShape],
    bases: Sequence[tuple[Tensor, Tensor]],
    sigma: Tensor,
    slice_errors: Tensor,
    adapters: Sequence[AdapterEntry],
) -> None:
    """A JD-Full collection that was not fitted but came as bases and Σ, into a folder that is written atomically.

    bases: (U [K, d_out, R], V [K, R, d_in]) for each slice; sigma [n, S, R, R]; slice_errors [n, S].
    """
    draft = Draft(folder, None, in_place=False)
    draft.bases(slices, bases, "none")
    draft.all_scalings(sigma)
    draft.errors(slice_errors)
    draft.seal(
        CollectionManifest(
            base_model=base_model,
            method="full",
            rank=bases[0][0].shape[2],
            clusters=bases[0][0].shape[0],
            metric="frobenius",
            dtype=dtype,
            seed=0,
            slices=tuple(slices),
            adapters=tuple(adapters),
            plain=(),
            skipped=(),
            files=draft.files,
        )
    )


def require_undamaged(old: Collection, names: Sequence[str]) -> None:
    """Files whose content goes into new files: a new digest must not bless old damage."""
    for name in names:
        if file_digest(old.path / name) != old.manifest.files[name]:
            raise JDLoRAError(f"{old.path / name}: was changed after it was written; compress the adapters again")


def _widened(sigma: Tensor, extra: int) -> Tensor:
    """[S, R, R] -> [S, R + extra, R + extra], zero-padded."""
    return torch.nn.functional.pad(sigma, (0, extra, 0, extra)) if extra else sigma
