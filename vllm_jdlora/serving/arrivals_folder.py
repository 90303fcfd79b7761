"""The folder of adapters that come while the server runs: one server's own, empty at its start, removed at its end."""

from __future__ import annotations

import atexit
import fcntl
import itertools
import os
import shutil
from pathlib import Path

from vllm_jdlora.cache import cache_root
from vllm_jdlora.errors import JDLoRAError

_held: list[int] = []
"""Locks of this process, open until it ends."""


def claim_arrivals_folder() -> Path:
    """An empty folder that no other running server uses, readable by its owner only.

    Folders are numbered and not random: the path is among the settings that vLLM keys its compiled code by, and a
    server that starts again shall find what it compiled before. What a killed server left behind goes at the next
    claim.

    Raises:
        JDLoRAError: the cache folder cannot be used.
    """
    root = cache_root() / "arrivals"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in itertools.count():
            lock = os.open(root / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            _held.append(lock)
            folder = root / str(number)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            atexit.register(_remove, folder, os.getpid())
            return folder
    except OSError as error:
        raise JDLoRAError(
            f"{root}: adapters that are loaded at run time cannot be kept there ({error.strerror}): set XDG_CACHE_HOME "
            "to a folder that can be written"
        ) from error
    raise AssertionError("unreachable")


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in processes forked from it
        shutil.rmtree(folder, ignore_errors=True)
