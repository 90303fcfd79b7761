"""One torch thread for many small products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from a second thread and lose much where it has to wait for a busy core.

    1,000 adapters of 7B size are stacked in 1 s by one thread, and in 11 to 79 s by two when another process wants the
    cores too; a search on small matrices takes up to ten times as long. In one thread results do not depend on the
    number of threads either.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
