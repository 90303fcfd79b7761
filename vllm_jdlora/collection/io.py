"""A compressed collection on disk: checked before use, and read from files that are held open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from vllm_jdlora.adapter import WEIGHTS_FILE
from vllm_jdlora.collection.content_check import check_content
from vllm_jdlora.collection.quantize import dequantized
from vllm_jdlora.collection.schema import (
    BASES_FILE,
    ERRORS_FILE,
    MANIFEST_FILE,
    CollectionManifest,
    scalings_file,
)
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import read_text
from vllm_jdlora.peft_config import CONFIG_FILE
from vllm_jdlora.tensor_file import Identity, TensorFile

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MANIFEST_BYTES = 1 << 30
"""Most that is read of a manifest."""
_STORED_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_QUANTIZED_DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}


class QuantizedBasis(NamedTuple):
    """One slice's bases as stored in 8 bits: U [K, d_out, R] and V [K, R, d_in], scales fp32 [K, R]."""

    u: torch.Tensor
    v: torch.Tensor
    u_scale: torch.Tensor
    v_scale: torch.Tensor

    def at(self, cluster: int) -> QuantizedBasis:
        """One cluster's: U [d_out, R], V [R, d_in], scales [R]."""
        return QuantizedBasis(*(tensor[cluster] for tensor in self))


class Collection:
    """An open collection. Tensors are read when they are asked for, from the files that were there when it was opened.

    A file that was changed in its place since then is told from its digest, and refused.
    """

    def __init__(self, path: Path, manifest: CollectionManifest):
        """Open the files that the manifest lists.

        Raises:
            JDLoRAError: one is missing, a link, or no safetensors file.
        """
        self.path = path
        self.manifest = manifest
        self._files = {name: _own_file(path / name) for name in manifest.files}
        self._condemned: dict[str, Identity] = {}
        self._shards = sorted(name for name in self._files if name.startswith("scalings-"))

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Collection:
        """Open a collection folder.

        Args:
            path: the folder.
            verify: also :meth:`check_content`. Without it only the manifest and the tensors' names, shapes and
                dtypes are checked.

        Raises:
            JDLoRAError: with the file (and tensor) that is wrong.
        """
        path = Path(path)
        file = path / MANIFEST_FILE
        try:
            text = read_text(file, MANIFEST_BYTES)
        except FileNotFoundError:
            raise JDLoRAError(
                f"{path}: no {MANIFEST_FILE}; this is not a collection (make one: jdlora compress)"
            ) from None
        except ValueError as error:
            raise JDLoRAError(f"{file}: cannot be read ({error})") from error
        try:
            manifest = CollectionManifest.from_json(text)
        except JDLoRAError as error:
            raise JDLoRAError(f"{file}: {error}; compress the adapters again") from error
        collection = cls(path.absolute(), manifest)
        collection._check_layout()
        if verify:
            collection.check_content()
        return collection

    def check_content(self) -> None:
        """Read every file, compare its digest and look for values that are not finite.

        Raises:
            JDLoRAError: with the file (and tensor) that is wrong.
        """
        check_content(self.path, self.manifest, self._files)

    # --- reading --------------------------------------------------------------------------------------------------

    def basis(self, slice_name: str, clusters: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Bases in one slice: (U [K, d_out, R], V [K, R, d_in]) of all clusters, or of these K in their order.

        In the stored dtype, or in fp32 where they are quantised.

        Raises:
            JDLoRAError: the file was changed or truncated since it was opened.
        """
        if self.manifest.quantize == "none":
            u, v = (self._read_rows(BASES_FILE, f"{slice_name}.{side}", clusters) for side in "UV")
            return u, v
        stored = self.quantized_basis(slice_name, clusters)
        return dequantized(stored.u.mT, stored.u_scale).mT, dequantized(stored.v, stored.v_scale)

    def quantized_basis(self, slice_name: str, clusters: Sequence[int] | None = None) -> QuantizedBasis:
        """The same of a quantised collection, as stored."""
        names = ("U", "V", "U_scale", "V_scale")
        return QuantizedBasis(*(self._read_rows(BASES_FILE, f"{slice_name}.{name}", clusters) for name in names))

    def sigma(self, index: int) -> torch.Tensor:
        """Scalings of one adapter as stored: [slices, R, R], or [slices, R] for JD-Diag; one contiguous read.

        Raises:
            JDLoRAError: there is no such adapter, or the file was changed or truncated since it was opened.
        """
        if not 0 <= index < len(self.manifest.adapters):
            raise JDLoRAError(f"{self.path}: no adapter number {index}; it has {len(self.manifest.adapters)}")
        shard, row = divmod(index, self._files[self._shards[0]].tensors["sigma"].shape[0])
        return self._read(self._shards[shard], "sigma", row)

    def matrices(self, index: int) -> torch.Tensor:
        """Scaling matrices of one adapter [slices, R, R] in the stored dtype, whatever the method."""
        sigma = self.sigma(index)
        return torch.diag_embed(sigma) if self.manifest.method == "diag" else sigma

    def index_of(self, name: str) -> int:
        """Row of a compressed adapter; ``JDLoRAError`` where there is none of that name."""
        try:
            return self._index[name]
        except KeyError:
            raise JDLoRAError(f"{self.path}: no compressed adapter named {name!r}") from None

    def plain_path(self, name: str) -> Path:
        """PEFT folder of an adapter that is kept uncompressed."""
        if name not in self._plain:
            raise JDLoRAError(f"{self.path}: no plain adapter named {name!r}")
        return self.path / "plain" / name

    def slice_errors(self) -> torch.Tensor:
        """Relative error (not squared) of each adapter in each slice, fp32 [n, slices]; NaN where it has nothing."""
        return self._read(ERRORS_FILE, "relative_error")

    def slice_output_errors(self) -> torch.Tensor | None:
        """The same in the activation metric, where the collection was fitted in it."""
        if self.manifest.metric == "frobenius":
            return None
        return self._read(ERRORS_FILE, "output_error")

    def size_in_bytes(self) -> int:
        """Bytes of the tensors that serve the compressed adapters (bases and scalings)."""
        return sum(self._files[name].identity.size for name in (BASES_FILE, *self._shards))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {entry.name: row for row, entry in enumerate(self.manifest.adapters)}

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.manifest.plain)

    def _read_rows(self, name: str, tensor: str, rows: Sequence[int] | None) -> torch.Tensor:
        if rows is None:
            return self._read(name, tensor)
        return torch.stack([self._read(name, tensor, row) for row in rows])

    def _read(self, name: str, tensor: str, row: int | None = None) -> torch.Tensor:
        file = self._files[name]
        found = file.read(tensor, row)
        if file.now() != file.identity:  # after the read: what was written while it went on shows too
            self._check_again(name, file)
            return self._read(name, tensor, row)
        return found

    def _check_again(self, name: str, file: TensorFile) -> None:
        """A file whose time of change is another: touched, or written over?"""
        now = file.now()
        if self._condemned.get(name) != now:
            if now.size == file.identity.size and file.digest() == self.manifest.files[name] and file.now() == now:
                file.identity = now
                return
            self._condemned[name] = now
        raise JDLoRAError(
            f"{file.path}: was changed in its place while it was in use: put back what was there, or replace the whole "
            "folder as `jdlora` does"
        )

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_layout(self) -> None:
        manifest = self.manifest
        n, slices, rank, clusters = len(manifest.adapters), len(manifest.slices), manifest.rank, manifest.clusters
        dtype = _STORED_DTYPES[manifest.dtype]
        base_dtype = dtype if manifest.quantize == "none" else _QUANTIZED_DTYPES[manifest.quantize]
        bases: dict[str, tuple[list[int], str]] = {}
        for part in manifest.slices:
            bases[f"{part.name}.U"] = [clusters, part.d_out, rank], base_dtype
            bases[f"{part.name}.V"] = [clusters, rank, part.d_in], base_dtype
            if manifest.quantize != "none":
                bases |= {f"{part.name}.{side}_scale": ([clusters, rank], "F32") for side in "UV"}
        self._check_tensors(BASES_FILE, bases)
        errors = ["relative_error", *(["output_error"] if manifest.metric != "frobenius" else [])]
        self._check_tensors(ERRORS_FILE, {name: ([n, slices], "F32") for name in errors})
        files = self._shards
        if files != [scalings_file(i) for i in range(len(files))]:
            raise JDLoRAError(f"{self.path / MANIFEST_FILE}: the scalings files are not numbered from 0")
        rows = []
        for file in files:
            place = self._files[file].tensors.get("sigma")
            rows.append(place.shape[0] if place and place.shape else 0)
            matrix = [rank] if manifest.method == "diag" else [rank, rank]
            self._check_tensors(file, {"sigma": ([rows[-1], slices, *matrix], dtype)})
        if sum(rows) != n or any(r != rows[0] for r in rows[:-1]) or rows[-1] > rows[0] or 0 in rows:
            raise JDLoRAError(f"{self.path}: the scalings files hold {rows} adapters, {MANIFEST_FILE} lists {n}")
        for entry in manifest.plain:
            folder = self.path / "plain" / entry.name
            for path in (folder.parent, folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE):
                if path.is_symlink() or not path.exists():
                    raise JDLoRAError(f"{path}: is a link or missing; a collection holds its own files")

    def _check_tensors(self, name: str, expected: Mapping[str, tuple[list[int], str]]) -> None:
        file, found = self.path / name, self._files[name].tensors
        if set(found) != set(expected):
            odd = sorted(set(found) ^ set(expected))[0]
            raise JDLoRAError(f"{file}: tensor {odd!r} is {'not expected' if odd in found else 'missing'}")
        for key, (shape, dtype) in expected.items():
            place = found[key]
            if list(place.shape) != shape or place.dtype != dtype:
                raise JDLoRAError(
                    f"{file}: {key} is {place.dtype} {list(place.shape)}, {MANIFEST_FILE} says {dtype} {shape}"
                )


def _own_file(file: Path) -> TensorFile:
    if file.is_symlink():
        raise JDLoRAError(f"{file}: is a link; a collection holds its own files")
    return TensorFile(file)
