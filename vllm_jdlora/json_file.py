"""JSON that comes from outside: from a regular file of bounded size, an object, with nothing in it named twice."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40


def read_text(file: Path, most_bytes: int) -> str:
    """The file's text.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file (a pipe would be waited for), larger than `most_bytes`, no UTF-8, or
            cannot be read.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except OSError as error:
        raise ValueError(error.strerror) from error
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise ValueError("not a regular file")
    with open(fd, "rb") as opened:
        if found.st_size > most_bytes:
            raise ValueError(f"{found.st_size} bytes; {most_bytes} is the most that is read")
        try:
            return opened.read(most_bytes).decode("utf-8")
        except OSError as error:
            raise ValueError(error.strerror) from error


def parsed_object(text: str | bytes) -> dict[str, Any]:
    """The object that the text describes.

    Raises:
        ValueError: it describes none, nests too deeply, or names a field twice, of which readers take one or the other.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(raw, dict):
        raise ValueError("must hold a JSON object")
    return raw


def short(value: object) -> str:
    """A value as Python shows it, cut: it may be long, and nest more deeply than `repr` can follow."""
    return _SHORT.repr(value)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        counts = Counter(names)
        twice = next(name for name in names if counts[name] > 1)
        raise ValueError(f"{twice[:80]!a} is there twice")
    return found
