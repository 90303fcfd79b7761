"""`results/bench_scale.jsonl` as a picture: throughput, first tokens, start-up and memory over adapters known."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_conditions import ROOT

from vllm_jdlora.evaluation.plot_style import BLUE, GREEN, ORANGE, REFERENCE_LINE, VERMILION, SavedFigure

RESULTS = ROOT / "loadtests" / "results" / "bench_scale.jsonl"
PICTURE = ROOT / "docs" / "scale.svg"


@dataclass(frozen=True)
class Figures:
    """What is drawn. served: of each size, the smallest first. starts: by size, and ``base``."""

    served: list[dict[str, Any]]
    starts: dict[str, dict[str, list[float]]]


def newest(results: Path, *, quick: bool = False) -> Figures:
    """The newest figures of each size, and the newest starts: those of different runs are not comparable.

    Raises:
        SystemExit: there are none.
    """
    lines = results.read_text().splitlines() if results.exists() else []
    records = [record for record in map(json.loads, filter(None, lines)) if record["quick"] <= quick]
    served = {s["adapters"]: s for record in records for s in record["served"]}
    starts = [record["starts"] for record in records if record["starts"]]
    if not served:
        raise SystemExit(f"{results}: no record to draw; run `make bench-scale` first")
    return Figures([served[adapters] for adapters in sorted(served)], starts[-1] if starts else {})


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
        uniform = [1e3 * s["beside_reference"]["own"]["ttft_seconds"][percentile] for s in served]
        axis.plot(sizes, uniform, color=BLUE, ls=line, marker="o", label=f"under load, {percentile}")
    for kind, colour in (("warm", ORANGE), ("cold", VERMILION)):
        found = [(s["adapters"], s["cold"]["disk"][kind]["p99"]) for s in served if "disk" in s["cold"]]
        if found:
            axis.plot(*zip(*((n, 1e3 * p99) for n, p99 in found), strict=True), color=colour, marker="s", ls="--",
                      label=f"{kind}, alone, p99")  # fmt: skip
    axis.set(title="first token, ms", ylim=(0, None))


def _start_ups(axis: Any, starts: dict[str, dict[str, list[float]]]) -> None:
    base = starts.get("base")
    sizes = [int(size) for size in starts if size != "base"]
    axis.set(title="start-up beyond that without LoRA, s")
    if base is None or not sizes:
        return
    for kind, label, colour in (("seconds", "until ready", BLUE), ("cpu_seconds", "of a processor", ORANGE)):
        more = [statistics.median(a - b for a, b in zip(starts[str(n)][kind], base[kind], strict=True)) for n in sizes]
        axis.plot(sizes, more, color=colour, marker="o", label=label)
    axis.axhline(0, **REFERENCE_LINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("-o", "--output", type=Path, default=PICTURE)
    args = parser.parse_args()
    print(f"drawn in {plot(newest(args.results), args.output)}")


if __name__ == "__main__":
    main()
