"""A Prometheus gauge with one time series, whose label values may change: the old series goes as the new one comes.

``prometheus_client`` keeps every combination of label values for ever once several processes share a metrics folder
(several API servers). There the series is written to a file of its own, which is replaced as a whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from vllm_jdlora.atomic_file import replacing

REFRESH_SECONDS = 0.1
"""How often the file is written for a new value under the same labels; for new labels at once."""


class OneSeries:
    """One gauge, one series."""

    def __init__(self, gauge: Gauge, *, per_process: bool):
        """
        Args:
            gauge: with label names and no series yet.
            per_process: where several API servers share a folder, each shows a series of its own; otherwise the last
                to set it speaks for all.
        """
        self._gauge = gauge
        self._labels: dict[str, str] = {}
        self._file: Path | None = None
        self._written = 0.0
        if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            # TYPE_MODE_ID.db is how MultiProcessCollector reads a file's name.
            name = gauge._name.replace(":", "-").replace("_", "-")
            suffix = f"-{os.getpid()}" if per_process else ""
            self._file = Path(folder) / f"gauge_mostrecent_{name}{suffix}.db"

    def set(self, labels: Mapping[str, str], value: float) -> None:
        """Show this value under these labels and under no others."""
        changed = labels != self._labels
        self._labels = dict(labels)
        if self._file is None:
            if changed:
                self._gauge.clear()
            self._gauge.labels(**self._labels).set(value)
            return
        now = time.time()
        if changed or now - self._written >= REFRESH_SECONDS:
            self._written = now
            self._write(self._file, value, now)

    def _write(self, file: Path, value: float, now: float) -> None:
        gauge = self._gauge
        names, values = list(self._labels), list(self._labels.values())
        with replacing(file) as new:  # which is not called *.db: such files are read
            series: Any = MmapedDict(str(new))
            series.write_value(mmap_key(gauge._name, gauge._name, names, values, gauge._documentation), value, now)
            series.close()
