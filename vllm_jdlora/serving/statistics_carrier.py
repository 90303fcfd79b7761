"""How counts of a worker and its scheduler reach the API server: on what every step sends there anyway.

No RPC is added, so a scrape never waits for a step and a step never for a scrape. The worker hangs its counts on the
output of a step where they changed; the scheduler puts them, with its own, into the statistics that vLLM sends with
that step's tokens to one API server. Totals travel as increments: whichever API server gets them adds them to its own
counter, and the counters of all API servers add up. A gauge travels when it changes, and the latest one counts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_jdlora.serving.failed_adapters import FAILED

TOTALS = ("sigma_swaps", "sigma_bytes", "base_swaps", "base_bytes", "load_seconds")
"""Counts of a worker that only grow."""

GAUGES = ("resident", "plain", "arrivals", "clusters", "resident_bases", "adapters_in_step", "revision")
"""Counts of a worker that say how things are now; ``revision`` is the text of the newest collection's digest."""

PER_STEP = ("clusters_in_step",)
"""Counts of a worker that belong to each step, also where they equal those of the step before."""

_REPORTED = (*TOTALS, *GAUGES, *PER_STEP, FAILED)
_ATTRIBUTE = "jdlora_counts"
_PREFIX = "jdlora:"


class ReportingWorker:
    """Mix-in before a vLLM worker with ``jdlora_statistics()``, which must be quick: it is called in every step."""

    @functools.cached_property
    def _counts_report(self) -> WorkerReport:
        return WorkerReport(self.jdlora_statistics)  # type: ignore[attr-defined]

    def execute_model(self, scheduler_output: Any) -> Any:
        return self._counts_report.attach(super().execute_model(scheduler_output))  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._counts_report.attach(super().sample_tokens(grammar_output))  # type: ignore[misc]


class WorkerReport:
    """Hangs counts on the outputs of a model runner."""

    def __init__(self, read: Callable[[], Mapping[str, Any]]):
        """
        Args:
            read: the counts now, by name; other names than those above are left out.
        """
        self._read = read
        self._sent: dict[str, Any] = {}

    def attach(self, output: Any) -> Any:
        """The output with the counts on it if they differ from those of the last one that had them.

        Args:
            output: of the model runner; ``None`` and outputs without requests pass unchanged.
        """
        if output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:
            return output
        read = self._read()
        counts = {name: read[name] for name in _REPORTED if name in read}
        if counts == self._sent:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            self._sent = counts
            return _CountedOutput(output, counts)
        if isinstance(output, ModelRunnerOutput):
            self._sent = counts
            setattr(output, _ATTRIBUTE, counts)
        return output


class _CountedOutput(AsyncModelRunnerOutput):
    """An output that is still being computed, and gets its counts when it is there."""

    def __init__(self, output: AsyncModelRunnerOutput, counts: dict[str, Any]):
        self._output, self._counts = output, counts

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        if output is not EMPTY_MODEL_RUNNER_OUTPUT:
            setattr(output, _ATTRIBUTE, self._counts)
        return output


class ReportingScheduler:
    """Mix-in before a vLLM scheduler: passes the worker's counts on with its own."""

    _worker_counts: Mapping[str, Any] = {}
    _sent_totals: Mapping[str, float] = {}
    _sent_gauges: Mapping[str, Any] = {}
    _has_stepped = False

    def waiting_by_reason(self) -> Mapping[str, int]:
        """Waiting requests by what they wait for (:data:`~vllm_jdlora.serving.metrics.WAITING_REASONS`)."""
        return {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._worker_counts = getattr(model_runner_output, _ATTRIBUTE, self._worker_counts)
        self._has_stepped = scheduler_output.total_num_scheduled_tokens > 0
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None and (report := self._report()):
            # Of all that SchedulerStats has, only a dictionary takes a new entry through vLLM's typed decoder, and the
            # zero keeps this entry out of sums and log lines.
            stats.num_kv_fetch_reqs_by_stage[_PREFIX + json.dumps(report)] = 0
        return stats

    def _report(self) -> dict[str, Any]:
        totals = {name: self._worker_counts[name] for name in TOTALS if name in self._worker_counts}
        report: dict[str, Any] = {
            name: grown for name, total in totals.items() if (grown := total - self._sent_totals.get(name, 0))
        }
        gauges = {name: self._worker_counts[name] for name in GAUGES if name in self._worker_counts}
        gauges["waiting"] = dict(self.waiting_by_reason())
        sent = self._sent_gauges
        report |= {name: value for name, value in gauges.items() if name not in sent or sent[name] != value}
        if self._has_stepped:
            report |= {name: self._worker_counts[name] for name in PER_STEP if name in self._worker_counts}
        self._sent_totals, self._sent_gauges, self._has_stepped = totals, gauges, False
        return report


def take_report(scheduler_stats: Any) -> dict[str, Any]:
    """Take the report out of a step's ``SchedulerStats``; empty where there is none.

    Returns:
        Increments of :data:`TOTALS`, changed :data:`GAUGES`, :data:`PER_STEP`, and ``waiting``: requests by reason.
    """
    entries = scheduler_stats.num_kv_fetch_reqs_by_stage
    for key in entries:
        if key.startswith(_PREFIX):
            del entries[key]
            report: dict[str, Any] = json.loads(key[len(_PREFIX) :])
            return report
    return {}
