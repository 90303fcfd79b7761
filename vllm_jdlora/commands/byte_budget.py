"""Sizes as arguments: `10MiB`, `1GiB`, `5000000`, and shares of the uncompressed bytes: `25%`, `1/8`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from fractions import Fraction

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("ib", 1024), ("b", 1000), ("", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII)


@dataclass(frozen=True)
class ByteBudget:
    """A number of bytes, or a share of the uncompressed ones."""

    text: str
    bytes: int | None = None
    share: Fraction | None = None

    def of(self, uncompressed: int) -> int:
        """The budget in bytes for adapters of so many bytes."""
        return int(self.share * uncompressed) if self.share is not None else self.bytes or 0


def byte_budget(text: str) -> ByteBudget:
    """For argparse: a size in bytes, or a share."""
    stripped = text.strip()
    try:
        if stripped.endswith("%"):
            share = Fraction(stripped[:-1]) / 100
        elif "/" in stripped:
            share = Fraction(stripped)
        else:
            return ByteBudget(stripped, bytes=size_in_bytes(stripped))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 25% or 1/8") from None
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a share lies between 0 and 1")
    return ByteBudget(stripped, share=share)


def size_in_bytes(text: str) -> int:
    """For argparse: `8GiB` (1024³), `8GB` (1000³), `8G` (1024³) or plain bytes."""
    matched = _SIZE.fullmatch(text.strip().lower())
    if matched is None or matched[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10MiB or 8GiB")
    size = int(Fraction(matched[1]) * _UNITS[matched[2]])
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least one byte")
    return size
