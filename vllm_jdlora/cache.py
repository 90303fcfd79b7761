"""The folder for what can be made again: compressed collections of the server's start, the demo's model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder (not created): ``cache_dir``, else ``$XDG_CACHE_HOME/vllm-jdlora``, else ``~/.cache/…``."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).expanduser().resolve() / "vllm-jdlora"
