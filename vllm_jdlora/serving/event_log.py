"""Log lines of what operators look for, as ``jdlora event=NAME key=value …``: grep them, or parse them with logfmt.

| event | when | keys |
|---|---|---|
| ``collection`` | a process has opened the collection that it will serve | ``path revision method rank clusters \
quantize adapters plain`` |
| ``serving`` | an API server is ready | ``collection revision scaling_slots plain_slots base_slots`` |
| ``adapter_load`` | an adapter came at run time | ``name result seconds relative_error`` |
| ``adapter_unload`` | the name of an adapter was taken back | ``name`` |
| ``reload`` | a call to reload the collection has ended | ``path result revision bases added changed removed \
paused_seconds seconds`` |
| ``revision`` | the engine serves another revision of the collection | ``engine old new`` |
| ``swaps`` | weights moved to the device since the last such line, every ten seconds at most | ``engine sigma_swaps \
sigma_bytes base_swaps base_bytes load_seconds seconds`` |
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("vllm.jdlora")

_BARE = re.compile(r"[\w.:/+@-]+", re.ASCII)


def event(name: str, /, **fields: Any) -> None:
    """Log one event; fields that are ``None`` are left out."""
    logger.info("jdlora event=%s %s", name, logfmt(fields))


def logfmt(fields: Mapping[str, Any]) -> str:
    """``key=value`` separated by spaces; a value that holds more than letters, digits and ``._:/+@-`` is in quotes."""
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items() if value is not None)


def _value(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


class SummedEvents:
    """Events that may come in every step: added up, and logged once in a while."""

    def __init__(self, name: str, every_seconds: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self._name, self._every, self._clock = name, every_seconds, clock
        self._sums: dict[str, float] = {}
        self._since: float | None = None

    def add(self, counts: Mapping[str, float], **fields: Any) -> None:
        """Add counts; log their sums if the last line is old enough, and always the first time."""
        if not any(counts.values()):
            return
        for key, count in counts.items():
            self._sums[key] = self._sums.get(key, 0) + count
        now = self._clock()
        if self._since is not None and now - self._since < self._every:
            return
        seconds = None if self._since is None else round(now - self._since, 1)
        event(self._name, **fields, **self._sums, seconds=seconds)
        self._sums.clear()
        self._since = now
