"""Prometheus metrics under ``jdlora:`` beside vLLM's own, and ``vllm:lora_requests_info`` as one series.

vLLM loads this logger as a ``vllm.stat_logger_plugins`` entry point in every server of the environment; where
compression was not asked for it is vLLM's own logger and nothing else. Labels are the model, the engine and fixed
words, never an adapter: there is no series that a server with more adapters would have more of.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_jdlora.serving import adapter_metrics, touchpoints
from vllm_jdlora.serving.event_log import SummedEvents, event
from vllm_jdlora.serving.one_series import OneSeries
from vllm_jdlora.serving.options import ServingOptions
from vllm_jdlora.serving.statistics_carrier import TOTALS, take_report

WAITING_REASONS = ("scaling_slot", "plain_slot", "base_slot", "other")
"""What a waiting request waits for; ``other`` is anything that a server without LoRA may wait for too."""

GAUGES = {
    "resident": ("jdlora:adapters_resident", "Compressed adapters whose scaling matrix is on the device."),
    "plain": ("jdlora:plain_adapters", "Uncompressed adapters that the worker holds."),
    "arrivals": ("jdlora:arrived_adapters", "Compressed adapters in the worker that came while the server ran."),
    "clusters": ("jdlora:clusters", "Clusters of the collection."),
    "resident_bases": ("jdlora:bases_resident", "Clusters whose bases are on the device."),
    "adapters_in_step": ("jdlora:adapters_in_step", "Distinct adapters in the last step."),
}
"""Count of a worker → name and meaning of its gauge."""

SLOTS = {
    "scaling_slots": ("jdlora:scaling_slots", "Scaling matrices that fit on the device."),
    "plain_slots": ("jdlora:plain_slots", "Uncompressed adapters that one step may hold."),
    "base_slots": ("jdlora:base_slots", "Clusters whose bases fit on the device."),
}
"""Serving option → name and meaning of its gauge, which never changes."""

COUNTERS = {
    "sigma_swaps": ("jdlora:sigma_swaps", "Scaling matrices copied to the device."),
    "sigma_bytes": ("jdlora:sigma_swap_bytes", "Bytes of the scaling matrices copied to the device."),
    "base_swaps": ("jdlora:base_swaps", "Bases copied to the device because a request needed their cluster."),
    "base_bytes": ("jdlora:base_swap_bytes", "Bytes of the bases copied to the device."),
    "load_seconds": ("jdlora:load_seconds", "Seconds that the worker spent on reading and copying adapters and bases."),
}
"""Count of a worker → name (Prometheus adds ``_total``) and meaning of its counter."""

CLUSTERS_PER_STEP = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

MAX_NAMES = 100
MAX_CHARACTERS = 8192
"""Of each list of names in ``vllm:lora_requests_info``."""


class JDPrometheusLogger(PrometheusStatLogger):
    """vLLM's Prometheus logger, and with compression the metrics of this package."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None):
        super().__init__(vllm_config, engine_indexes)
        self._compression: _CompressionMetrics | None = None
        options = ServingOptions.from_additional_config(vllm_config.additional_config)
        if options is not None:
            touchpoints.check("metrics")
            gauge = self.gauge_lora_info
            self.gauge_lora_info: Any = None  # vLLM's record() passes over it
            self._compression = _CompressionMetrics(options, self.per_engine_labelvalues, gauge)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        if self._compression is not None and scheduler_stats is not None:
            # Taken out before the loggers after this one see it.
            self._compression.record(scheduler_stats, *args, **kwargs)
        super().record(scheduler_stats, iteration_stats, *args, **kwargs)

    def log_engine_initialized(self) -> None:
        super().log_engine_initialized()
        if self._compression is not None:
            self._compression.log_options()


class _CompressionMetrics:
    """The metrics of one server, whatever its number of engines."""

    def __init__(self, options: ServingOptions, engines: Mapping[int, list[Any]], lora_info: Gauge):
        """
        Args:
            options: resolved.
            engines: model name and engine, the labels' values, of each engine.
            lora_info: vLLM's gauge of running and waiting names, without a series yet.
        """
        _unregister("jdlora:")
        self._options = options
        self._max_lora = str((options.scaling_slots or 0) + (options.plain_slots or 0))
        self._gauges = {
            name: {i: family.labels(*labels) for i, labels in engines.items()}
            for name, (metric, text) in GAUGES.items()
            for family in [_gauge(metric, text)]
        }
        self._counters = {
            name: {i: family.labels(*labels) for i, labels in engines.items()}
            for name, (metric, text) in COUNTERS.items()
            for family in [Counter(metric, text, ["model_name", "engine"])]
        }
        for name, (metric, text) in SLOTS.items():
            if (slots := getattr(options, name)) is not None:
                family = _gauge(metric, text)
                for labels in engines.values():
                    family.labels(*labels).set(slots)
        waiting = _gauge("jdlora:waiting_requests", "Waiting requests by what they wait for.", "reason")
        self._waiting = {i: {r: waiting.labels(*labels, r) for r in WAITING_REASONS} for i, labels in engines.items()}
        clusters = Histogram(
            "jdlora:clusters_per_step",
            "Clusters whose bases a step reads.",
            ["model_name", "engine"],
            buckets=CLUSTERS_PER_STEP,
        )
        self._clusters = {i: clusters.labels(*labels) for i, labels in engines.items()}
        self._lora_info = OneSeries(lora_info, per_process=True)
        self._revisions = dict.fromkeys(engines, options.revision)
        self._swaps = {i: SummedEvents("swaps") for i in engines}
        self._adapters = adapter_metrics.start(str(next(iter(engines.values()))[0]), options.revision)

    def record(self, scheduler_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        report = take_report(scheduler_stats)
        for name, gauge in self._gauges.items():
            if name in report:
                gauge[engine_idx].set(report[name])
        for name, counter in self._counters.items():
            if name in report:
                counter[engine_idx].inc(report[name])
        if "clusters_in_step" in report:
            self._clusters[engine_idx].observe(report["clusters_in_step"])
        if "waiting" in report:
            for reason, waiting in self._waiting[engine_idx].items():
                waiting.set(report["waiting"].get(reason, 0))
        if "revision" in report:
            self._follow_revision(str(report["revision"]), engine_idx)
        self._swaps[engine_idx].add({name: report.get(name, 0) for name in TOTALS}, engine=engine_idx)
        labels = {
            "max_lora": self._max_lora,
            "waiting_lora_adapters": name_list(scheduler_stats.waiting_lora_adapters),
            "running_lora_adapters": name_list(scheduler_stats.running_lora_adapters),
        }
        self._lora_info.set(labels, time.time())

    def log_options(self) -> None:
        options = self._options
        slots = {name: getattr(options, name) for name in SLOTS}
        event("serving", collection=options.collection, revision=options.revision, **slots)

    def _follow_revision(self, revision: str, engine_idx: int) -> None:
        old = self._revisions[engine_idx]
        if revision != old:
            self._revisions[engine_idx] = revision
            self._adapters.follow_revision(revision)
            event("revision", engine=engine_idx, old=old, new=revision)


def name_list(requests: Mapping[str, int]) -> str:
    """The adapters with requests, as routers read them: separated by commas, those with the most requests first if
    there are more than :data:`MAX_NAMES`, and never longer than :data:`MAX_CHARACTERS`.

    A name with a comma is left out: no router could tell it from two names.

    Args:
        requests: number of requests by adapter; zeros do not count.
    """
    names = [name for name, count in requests.items() if count and "," not in name]
    if len(names) > MAX_NAMES:
        names = heapq.nlargest(MAX_NAMES, names, key=requests.__getitem__)
    text = ",".join(names)
    # Rather a name too few than half a name.
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS + 1].rpartition(",")[0]


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(name, text, ["model_name", "engine", *labels], multiprocess_mode="mostrecent")


def _unregister(prefix: str) -> None:
    """Forget the metrics of a server that this process had before, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(prefix):
            REGISTRY.unregister(collector)
