"""A file that appears whole or not at all; a folder of them is `collection/atomic_folder.py`'s."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(file: Path, *, durable: bool = False) -> Iterator[Path]:
    """A path beside ``file`` to write to: what is there at the end of the block takes the place of ``file``.

    Where the block raises, ``file`` is as it was and nothing is left beside it.

    Args:
        file: may exist already; its folder does.
        durable: the content is on the disk, not in the system's memory only, before it takes its place.

    Raises:
        OSError: the disk refuses.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.new")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()
