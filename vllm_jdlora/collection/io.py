"""A compressed collection on disk: written atomically, read memory-mapped, checked before use."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

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
from vllm_jdlora.peft_config import CONFIG_FILE

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_QUANTIZED_DTYPES = {"int8": "I8", "fp8": "F8_E4M3"}


class QuantizedBasis(NamedTuple):
    """One slice's bases as stored in 8 bits: U [K, d_out, R] and V [K, R, d_in], scales fp32 [K, R]."""

    u: torch.Tensor
    v: torch.Tensor
    u_scale: torch.Tensor
    v_scale: torch.Tensor


class Collection:
    """An open collection. Tensors are views of the mapped files: nothing is read before it is used."""

    def __init__(self, path: Path, manifest: CollectionManifest):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Collection:
        """Open a collection folder.

        Args:
            path: the folder.
            verify: also read every file, compare its digest and look for values that are not finite. Without it
                only the manifest and the tensors' names, shapes and dtypes are checked.

        Raises:
            JDLoRAError: with the file (and tensor) that is wrong.
        """
        path = Path(path)
        file = path / MANIFEST_FILE
        try:
            text = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise JDLoRAError(
                f"{path}: no {MANIFEST_FILE}; this is not a collection (make one: jdlora compress)"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise JDLoRAError(f"{file}: cannot be read ({error})") from error
        try:
            manifest = CollectionManifest.from_json(text)
        except JDLoRAError as error:
            raise JDLoRAError(f"{file}: {error}; compress the adapters again") from error
        collection = cls(path.absolute(), manifest)
        collection._check_layout()
        if verify:
            check_content(collection.path, manifest)
        return collection

    # --- reading --------------------------------------------------------------------------------------------------

    def basis(self, slice_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Bases of all clusters in one slice: (U [K, d_out, R], V [K, R, d_in]).

        In the stored dtype and mapped, or in fp32 where they are quantised.
        """
        if self.manifest.quantize == "none":
            return self._bases.get_tensor(f"{slice_name}.U"), self._bases.get_tensor(f"{slice_name}.V")
        stored = self.quantized_basis(slice_name)
        return dequantized(stored.u.mT, stored.u_scale).mT, dequantized(stored.v, stored.v_scale)

    def quantized_basis(self, slice_name: str) -> QuantizedBasis:
        """Bases of all clusters in one slice of a quantised collection, as stored; mapped."""
        names = ("U", "V", "U_scale", "V_scale")
        return QuantizedBasis(*(self._bases.get_tensor(f"{slice_name}.{name}") for name in names))

    def sigma(self, index: int) -> torch.Tensor:
        """Scalings of one adapter as stored: [slices, R, R], or [slices, R] for JD-Diag; mapped, contiguous."""
        if not 0 <= index < len(self.manifest.adapters):
            raise JDLoRAError(f"{self.path}: no adapter number {index}; it has {len(self.manifest.adapters)}")
        shard, row = divmod(index, self._shards[0].shape[0])
        return self._shards[shard][row]

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
        with self._open(ERRORS_FILE) as file:
            return file.get_tensor("relative_error")

    def slice_output_errors(self) -> torch.Tensor | None:
        """The same in the activation metric, where the collection was fitted in it."""
        if self.manifest.metric == "frobenius":
            return None
        with self._open(ERRORS_FILE) as file:
            return file.get_tensor("output_error")

    def size_in_bytes(self) -> int:
        """Bytes of the tensors that serve the compressed adapters (bases and scalings)."""
        names = [BASES_FILE, *(scalings_file(i) for i in range(len(self._shards)))]
        return sum((self.path / name).stat().st_size for name in names)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {entry.name: row for row, entry in enumerate(self.manifest.adapters)}

    @cached_property
    def _plain(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.manifest.plain)

    @cached_property
    def _bases(self) -> Any:
        return safe_open(self.path / BASES_FILE, framework="pt")

    @cached_property
    def _shards(self) -> list[torch.Tensor]:
        files = sorted(f for f in self.manifest.files if f.startswith("scalings-"))
        return [safe_open(self.path / f, framework="pt").get_tensor("sigma") for f in files]

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise JDLoRAError(f"{self.path / name}: not a readable safetensors file ({error})") from error

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
        files = sorted(f for f in manifest.files if f.startswith("scalings-"))
        if files != [scalings_file(i) for i in range(len(files))]:
            raise JDLoRAError(f"{self.path / MANIFEST_FILE}: the scalings files are not numbered from 0")
        rows = []
        for file in files:
            with self._open(file) as tensors:
                shape = tensors.get_slice("sigma").get_shape() if "sigma" in tensors.keys() else None  # noqa: SIM118
            rows.append(shape[0] if shape else 0)
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
        file = self.path / name
        if file.is_symlink():
            raise JDLoRAError(f"{file}: is a link; a collection holds its own files")
        with self._open(name) as tensors:
            found = set(tensors.keys())
            if found != set(expected):
                odd = sorted(found ^ set(expected))[0]
                raise JDLoRAError(f"{file}: tensor {odd!r} is {'not expected' if odd in found else 'missing'}")
            for key, (shape, dtype) in expected.items():
                part = tensors.get_slice(key)
                if part.get_shape() != shape or part.get_dtype() != dtype:
                    raise JDLoRAError(
                        f"{file}: {key} is {part.get_dtype()} {part.get_shape()}, {MANIFEST_FILE} says {dtype} {shape}"
                    )


@contextmanager
def written_atomically(target: Path, marker: str, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    With ``force`` an existing folder is moved aside first and removed only when the new one is in place. Only an
    empty folder, or one with the file ``marker`` in it, is ever replaced: ``-o ~ --force`` must not cost a home.

    Raises:
        JDLoRAError: ``target`` exists (without ``force``), is not such a folder, or the disk refuses.
    """
    target = Path(target).absolute()
    if target.exists() or target.is_symlink():
        if not force:
            raise JDLoRAError(f"{target}: exists already; choose another name or give --force to replace it")
        if not target.is_dir() or target.is_symlink():
            raise JDLoRAError(f"{target}: is not a folder; it is not replaced")
        if not (target / marker).is_file() and any(target.iterdir()):
            raise JDLoRAError(f"{target}: has other things than {marker} in it; it is not replaced")
    token = secrets.token_hex(4)
    temporary = target.with_name(f".{target.name}.{token}.new")
    old = target.with_name(f".{target.name}.{token}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                # safetensors writes files that only their owner can read; the server may be another user.
                file.chmod(readable)
            _sync(file)
        _sync(temporary)
        if target.exists():
            os.replace(target, old)
        try:
            os.rename(temporary, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise JDLoRAError(f"{target}: cannot be written ({problem}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
