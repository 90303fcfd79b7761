"""The file of one adapter that came while a server ran: its Σ on the bases of a collection, named by its content."""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_jdlora.adapter import file_digest
from vllm_jdlora.collection.io import TORCH_DTYPES
from vllm_jdlora.collection.schema import BASES_FILE, CollectionManifest
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.errors import JDLoRAError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEY = "jdlora"


def write_arrival(
    folder: Path,
    sigma: Tensor,
    *,
    manifest: CollectionManifest,
    cluster: int,
    name: str,
    relative_error: float,
    source_sha256: str,
) -> str:
    """Write the Σ of an adapter on the bases of `manifest`'s collection; the file's digest, 64 hex characters.

    The file appears whole or not at all, and the same content always is the same file.

    Args:
        folder: an existing folder of such files.
        sigma: [slices, R, R], or [slices, R] for JD-Diag, in the collection's order of slices and dtype.
        manifest: of the collection that the bases belong to.
        cluster: whose bases these are.
        name: of the adapter.
        relative_error: ‖ΔW − UΣV‖_F / ‖ΔW‖_F for the values as stored.
        source_sha256: digest of the adapter that it was made from.

    Raises:
        JDLoRAError: values of the wrong shape or dtype or that are not finite, or the disk refuses.
    """
    if problem := _problem(sigma, manifest):
        raise JDLoRAError(f"adapter {name!r} cannot be stored: {problem}")
    facts = {
        "bases": manifest.files[BASES_FILE],
        "cluster": cluster,
        "name": name,
        "relative_error": relative_error,
        "source_sha256": source_sha256,
    }
    temporary = folder / f".{secrets.token_hex(8)}.new"
    try:
        digest = write_streamed(
            temporary, {"sigma": (sigma.dtype, tuple(sigma.shape))}, [sigma], {_KEY: json.dumps(facts)}
        )
        os.replace(temporary, arrival_path(folder, digest))
    except OSError as error:
        raise JDLoRAError(f"{folder}: adapter {name!r} cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def read_arrival(folder: Path, digest: str, manifest: CollectionManifest) -> Tensor:
    """Σ [slices, R, R] or [slices, R] of a file that :func:`write_arrival` wrote for the same bases.

    Raises:
        JDLoRAError: there is no such file, it was changed, or it belongs to other bases than `manifest`'s.
    """
    file = arrival_path(folder, digest)
    if file.is_symlink() or not file.is_file():
        raise JDLoRAError(f"{file}: is a link or missing; load the adapter again")
    if file_digest(file) != digest:
        raise JDLoRAError(f"{file}: was changed after it was written; load the adapter again")
    try:
        with safe_open(file, framework="pt") as tensors:
            facts = json.loads((tensors.metadata() or {}).get(_KEY, "{}"))
            sigma = tensors.get_tensor("sigma")
    except (SafetensorError, OSError, ValueError) as error:
        raise JDLoRAError(f"{file}: not a readable file of an adapter ({error})") from error
    if not isinstance(facts, dict) or facts.get("bases") != manifest.files[BASES_FILE]:
        raise JDLoRAError(f"{file}: its Σ belongs to other bases than those of this collection; load the adapter again")
    if problem := _problem(sigma, manifest):
        raise JDLoRAError(f"{file}: {problem}; load the adapter again")
    return sigma


def arrival_path(folder: Path, digest: str) -> Path:
    """Where the file of that digest lies; a digest is data, never a path."""
    if not _DIGEST.fullmatch(digest):
        raise JDLoRAError(f"{digest[:80]!a} is not the digest of an adapter's file")
    return folder / f"{digest}.safetensors"


def _problem(sigma: Tensor, manifest: CollectionManifest) -> str | None:
    matrix = (manifest.rank,) if manifest.method == "diag" else (manifest.rank, manifest.rank)
    shape, dtype = (len(manifest.slices), *matrix), TORCH_DTYPES[manifest.dtype]
    if tuple(sigma.shape) != shape or sigma.dtype != dtype:
        return f"its Σ is {sigma.dtype} {tuple(sigma.shape)}, the collection's are {dtype} {shape}"
    if not bool(torch.isfinite(sigma).all()):
        return "its Σ holds NaN or infinity"
    return None
