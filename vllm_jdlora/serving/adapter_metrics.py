"""What an API server knows of adapters: the revision and how many it serves, and what became of those loaded."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import Counter, Gauge, Histogram

from vllm_jdlora.serving.event_log import event
from vllm_jdlora.serving.one_series import OneSeries

Result = Literal["compressed", "plain", "refused"]

LOAD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RELATIVE_ERRORS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class AdapterMetrics:
    """Made once for each API server by :class:`~vllm_jdlora.serving.metrics.JDPrometheusLogger`."""

    def __init__(self, model_name: str, revision: str | None):
        info = Gauge(
            "jdlora:collection_info",
            "1 for the revision of the collection that is served.",
            ["model_name", "revision"],
            multiprocess_mode="mostrecent",
        )
        self._model_name = model_name
        self._collection_info = OneSeries(info, per_process=False)
        self._reloaded = False
        self._show_revision(revision)
        known = Gauge(
            "jdlora:adapters_known",
            "Adapters that the server serves by name.",
            ["model_name", "kind"],
            multiprocess_mode="mostrecent",
        )
        self._known = {kind: known.labels(model_name, kind) for kind in ("compressed", "plain")}
        labels = ["model_name", "result"]
        loads = Counter("jdlora:adapter_loads", "Adapters loaded at run time, by what became of them.", labels)
        seconds = Histogram(
            "jdlora:adapter_load_seconds",
            "Seconds from the call that loads an adapter until it can be served, or is refused.",
            labels,
            buckets=LOAD_SECONDS,
        )
        self._error = Histogram(
            "jdlora:projection_error",
            "Relative error (Frobenius, not squared) of adapters loaded at run time on the bases that they got or "
            "would have got.",
            ["model_name"],
            buckets=RELATIVE_ERRORS,
        ).labels(model_name)
        # All at once, so that a rate over them starts at zero.
        self._loads = {result: loads.labels(model_name, result) for result in get_args(Result)}
        self._seconds = {result: seconds.labels(model_name, result) for result in get_args(Result)}

    def set_revision(self, revision: str) -> None:
        """The engine serves this revision since this server's call, whether or not it has made a step since."""
        self._reloaded = True
        self._show_revision(revision)

    def follow_revision(self, revision: str) -> None:
        """A step was of this revision. Once this server has changed it, it knows: the step may be an older one."""
        if not self._reloaded:
            self._show_revision(revision)

    def _show_revision(self, revision: str | None) -> None:
        self._collection_info.set({"model_name": self._model_name, "revision": str(revision)}, 1)

    def set_known(self, compressed: int, plain: int) -> None:
        self._known["compressed"].set(compressed)
        self._known["plain"].set(plain)

    def observe_load(self, result: Result, seconds: float, relative_error: float | None) -> None:
        self._loads[result].inc()
        self._seconds[result].observe(seconds)
        if relative_error is not None:
            self._error.observe(relative_error)


_metrics: AdapterMetrics | None = None


def start(model_name: str, revision: str | None) -> AdapterMetrics:
    """Count from now on; before, and where statistics are off, loads are only logged.

    revision: of the collection that is served.
    """
    global _metrics
    _metrics = AdapterMetrics(model_name, revision)
    return _metrics


def set_revision(revision: str) -> None:
    """This server has told the engine to serve another revision."""
    if _metrics is not None:
        _metrics.set_revision(revision)


def set_known(compressed: int, plain: int) -> None:
    """How many adapters the server serves by name."""
    if _metrics is not None:
        _metrics.set_known(compressed, plain)


def observe_load(name: str, result: Result, seconds: float, relative_error: float | None = None) -> None:
    """An adapter was loaded at run time, or refused.

    Args:
        name: of the adapter.
        result: ``compressed``; ``plain`` where it was put into a plain slot; ``refused`` where it cannot be served.
        seconds: from the call to its end.
        relative_error: of the projection, where there was one.
    """
    if _metrics is not None:
        _metrics.observe_load(result, seconds, relative_error)
    event("adapter_load", name=name, result=result, seconds=float(seconds), relative_error=relative_error)
