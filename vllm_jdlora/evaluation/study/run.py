"""Runs the parts of a study, one after the other, and writes what they found: summary.json and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.evaluate import BASE, UNCOMPRESSED
from vllm_jdlora.evaluation.plots import (
    plot_convergence,
    plot_error_over_clusters,
    plot_over_bytes,
    plot_performance_over_error,
)
from vllm_jdlora.evaluation.records import first_items
from vllm_jdlora.evaluation.study.baselines import baselines
from vllm_jdlora.evaluation.study.convergence import convergence
from vllm_jdlora.evaluation.study.leaks import leakage
from vllm_jdlora.evaluation.study.ours import ours
from vllm_jdlora.evaluation.study.part import Part, Run
from vllm_jdlora.evaluation.study.ranks import ranks
from vllm_jdlora.evaluation.study.settings import PARTS, StudySettings
from vllm_jdlora.evaluation.study.study import Progress, Study
from vllm_jdlora.evaluation.study.sweep import sweep
from vllm_jdlora.evaluation.study.trained_longer import trained_longer
from vllm_jdlora.evaluation.summary import summarise

_RUNS: Mapping[str, Run] = dict(
    zip(PARTS, (ours, baselines, sweep, ranks, leakage, convergence, trained_longer), strict=True)
)
SUMMARY_FILE = "summary.json"


def run_study(settings: StudySettings, progress: Progress | None = None) -> dict[str, Part]:
    """What each part found, in the order of `PARTS`.

    Stopped at any point and called again with the same settings, it goes on: fits and measurements that are complete
    are found in the output folder. Writes ``summary.json`` (parts of earlier runs stay in it) and ``plots``.

    Raises:
        JDLoRAError: the folder holds another study, or something that is needed is missing.
    """
    study = Study(settings, progress)
    found = {}
    for name in PARTS:
        if name in settings.parts:
            study.refused.clear()
            found[name] = replace(_RUNS[name](study), refused=dict(study.refused))
            if name == "baselines" and "ours" in found:
                found[name] = beside(found["ours"], found[name])
            write_summary(settings, {name: found[name]})
    draw(found, settings.output / "plots")
    return found


def beside(ours: Part, baselines: Part) -> Part:
    """The baselines with ours on their items, without answers where none of theirs has any."""
    answers = any(record.answers for record in baselines.records)
    count = {r.adapter: len(r.losses) for r in baselines.records if r.variant == UNCOMPRESSED}
    own = [first_items(record, count[record.adapter], answers=answers) for record in ours.records]
    # Losses change against the uncompressed ones of the same measurement: other batches round otherwise in bf16.
    rows = [row for row in summarise(own) if row.variant not in (BASE, UNCOMPRESSED)]
    records = [record for record in own if record.variant not in (BASE, UNCOMPRESSED)]
    return replace(
        baselines,
        tables={"": [*summarise(baselines.records), *rows]},
        records=[*baselines.records, *records],
    )


def write_summary(settings: StudySettings, parts: Mapping[str, Part]) -> Path:
    """Each part with the settings it was run with, beside the parts of earlier runs."""
    file = settings.output / SUMMARY_FILE
    summary = read_summary(file)
    own = {key: _plain(value) for key, value in asdict(settings).items() if key not in ("output", "parts")}
    for name, part in parts.items():
        summary[name] = {"settings": own, **part.to_json()}
    try:
        with replacing(file) as new:
            new.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise JDLoRAError(f"{file}: cannot be written ({error.strerror})") from error
    return file


def read_summary(file: Path) -> dict[str, Any]:
    """Empty where there is none yet."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise JDLoRAError(f"{file}: cannot be read ({error}); remove it, it is made anew from the records") from error


def draw(parts: Mapping[str, Part], folder: Path) -> list[Path]:
    """The plots that these parts have the data for."""
    drawn = []
    # Baselines have ours beside them, on the same items; ours alone may be measured on more, and with answers.
    methods = [parts[name] for name in ("baselines", "ours") if name in parts]
    if methods:
        drawn.append(plot_over_bytes(methods[0].tables[""], folder / "bytes.svg"))
        shown = next((part for part in methods if any(r.answers for r in part.records)), methods[0])
        drawn.append(plot_performance_over_error(shown.records, folder / "error.svg"))
    if "sweep" in parts and parts["sweep"].facts["points"]:
        drawn.append(plot_error_over_clusters(parts["sweep"].facts["points"], folder / "clusters.svg"))
    if "convergence" in parts:
        drawn.append(plot_convergence(parts["convergence"].facts["energy_lost"], folder / "convergence.svg"))
    return drawn


def _plain(value: Any) -> Any:
    if isinstance(value, Path | Fraction):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
