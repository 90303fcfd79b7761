"""How long a worker has spent on bringing weights to its device."""

from __future__ import annotations

import time


class LoadClock:
    """Runs inside ``with``; blocks may be nested, and count once.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._start = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start
