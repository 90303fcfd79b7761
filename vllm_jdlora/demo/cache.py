"""The digest that tells whether something the demonstration made is still current."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def text_digest(parts: Iterable[str]) -> str:
    """One SHA-256 over several strings, in the order given."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()
