"""`results/bench_scale.jsonl` as a picture: throughput, first tokens, start-up and memory over adapters known."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_conditions import ROOT
from bench_results import draw_anew
from scale_report import DISK, PAGE_CACHE

from vllm_jdlora.evaluation.plot_style import BLUE, GREEN, ORANGE, REFERENCE_LINE, VERMILION, SavedFigure

RESULTS = ROOT / "loadtests" / "results" / "bench_scale.jsonl"
PICTURE = ROOT / "docs" / "scale.svg"


@dataclass(frozen=True)
class Figures:
    """What is drawn: served of each size, the smallest first; starts of each size, and without LoRA in the same run."""

    served: list[dict[str, Any]]
    starts: dict[int, tuple[dict[str, Any], dict[str, Any]]]


def newest(results: Path, *, quick: bool = False) -> Figures:
    """The newest figures of each size. Runs differ in speed: what is drawn of times is within a run.

    Raises:
        SystemExit: there are none.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    records = [record for record in map(json.loads, filter(None, lines)) if record["quick"] <= quick]
    served = {s["adapters"]: s for record in records for s in record["served"]}
    starts = {
        int(size): (found, record["starts"]["base"])
        for record in records
        for size, found in record["starts"].items()
        if size != "base"
    }
    if not served:
        raise SystemExit(f"{results}: no record to draw; run `make bench-scale` first")
    return Figures([served[adapters] for adapters in sorted(served)], dict(sorted(starts.items())))


def plot(figures: Figures, file: Path = PICTURE) -> Path:
    """Four panels over the number of adapters, on a logarithmic scale."""
    served = figures.served
    sizes = [s["adapters"] for s in served]
    with SavedFigure(file, 9, 6, nrows=2, ncols=2) as ((rate, first), (start, memory)):
        _throughput(rate, served, sizes)
        _first_tokens(first, served, sizes)
        _start_ups(start, figures.starts)
        kinds = {"file": ("mapped files", GREEN), "anonymous": ("the processes' own", BLUE)}
        for kind, (label, colour) in kinds.items():
            values = [sum(m[kind] for m in s["memory_bytes"].values()) / 1e9 for s in served]
            memory.plot(sizes, values, color=colour, marker="o", label=label)
        memory.set(title="memory of all processes, GB", ylim=(0, None))
        for axis in (rate, first, start, memory):
            axis.set_xscale("log")
            axis.set_xlabel("adapters known")
            axis.title.set_fontsize(10)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
    return file


def _throughput(axis: Any, served: list[dict[str, Any]], sizes: list[int]) -> None:
    ratios = []
    for s in served:
        pair = s["beside_reference"]
        rates = zip(pair["own"]["tokens_per_second"], pair["reference"]["tokens_per_second"], strict=True)
        ratios.append([100 * own / reference for own, reference in rates])
    middle = [statistics.median(r) for r in ratios]
    spread = [[m - min(r) for m, r in zip(middle, ratios, strict=True)]]
    spread += [[max(r) - m for m, r in zip(middle, ratios, strict=True)]]
    axis.errorbar(sizes, middle, yerr=spread, color=BLUE, marker="o", capsize=3)
    axis.axhline(97, **REFERENCE_LINE)
    axis.set(title=f"tokens/s, % of {sizes[0]:,} adapters in the same round", ylim=(0, None))


def _first_tokens(axis: Any, served: list[dict[str, Any]], sizes: list[int]) -> None:
    for percentile, line in (("p50", "-"), ("p99", "--")):
        pairs = [[s["beside_reference"][side]["ttft_seconds"] for side in ("own", "reference")] for s in served]
        shares = [100 * own[percentile] / reference[percentile] for own, reference in pairs]
        label = f"under load, of {sizes[0]:,} adapters, {percentile}"
        axis.plot(sizes, shares, color=BLUE, ls=line, marker="o", label=label)
    for where, said, colour in ((PAGE_CACHE, "in the page cache", ORANGE), (DISK, "on disk", VERMILION)):
        if found := [(s["adapters"], 100 * s["cold"][where]["p99_ratio"]) for s in served if where in s["cold"]]:
            label = f"never asked for, Σ {said}, of familiar ones, p99"
            axis.plot(*zip(*found, strict=True), color=colour, marker="s", ls="--", label=label)
    axis.axhline(110, **REFERENCE_LINE)
    axis.set(title="time to first token, %", ylim=(0, None))


def _start_ups(axis: Any, starts: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    axis.set(title="start-up beyond that without LoRA in the same round, s")
    for kind, label, colour in (("seconds", "until ready", BLUE), ("cpu_seconds", "of a processor", ORANGE)):
        more = [
            statistics.median(a - b for a, b in zip(own[kind], base[kind], strict=True))
            for own, base in starts.values()
        ]
        axis.plot(list(starts), more, color=colour, marker="o", label=label)
    axis.axhline(0, **REFERENCE_LINE)


def main() -> None:
    draw_anew(__doc__, RESULTS, PICTURE, lambda results, picture: plot(newest(results), picture))


if __name__ == "__main__":
    main()
