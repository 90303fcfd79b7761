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


def text_digest(parts: Iterable[str]) -> str:
    """One SHA-256 over several strings, in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
