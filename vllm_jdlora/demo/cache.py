"""Where the demonstration keeps what it made, and digests that tell whether it is still current."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder (not created): ``cache_dir``, else ``$XDG_CACHE_HOME/vllm-jdlora``, else ``~/.cache/…``."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).expanduser().resolve() / "vllm-jdlora"


def file_sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(parts: Iterable[str | Path]) -> str:
    """One SHA-256 over strings and over files' names and bytes, in the order given; where files lie is not in it."""
    digest = hashlib.sha256()
    for part in parts:
        text = f"{part.name}\0{file_sha256(part)}" if isinstance(part, Path) else part
        digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def adapter_digest(folder: Path) -> str:
    """Digest of what makes a PEFT adapter what it is: its name, its configuration and its weights."""
    return content_digest([folder.name, folder / "adapter_config.json", folder / "adapter_model.safetensors"])
