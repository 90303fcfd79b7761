"""The last line of `results/soak.jsonl` as a picture: throughput, first tokens, memory over time, and events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_conditions import ROOT
from bench_results import draw_anew

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.plot_style import BLUE, GREEN, GREY, ORANGE, REFERENCE_LINE, VERMILION, SavedFigure
from vllm_jdlora.evaluation.records import read_lines

RESULTS = ROOT / "loadtests" / "results" / "soak.jsonl"
PICTURE = ROOT / "docs" / "soak.svg"


def plot(record: dict[str, Any], file: Path = PICTURE) -> Path:
    """Three panels over minutes; lines from top to bottom are reloads, ticks at the bottom calls on one adapter."""
    pieces = record["pieces"]
    with SavedFigure(file, 9, 7, nrows=3, ncols=1, sharex=True) as ((rate,), (first,), (memory,)):
        _curve(rate, pieces, "tokens_per_second", BLUE, "output tokens/s")
        rate.axhline(
            record["capacity"]["output_tokens_per_second"], label="capacity, measured before", **REFERENCE_LINE
        )
        _curve(first, pieces, "ttft_p50", BLUE, "p50", 1e3)
        _curve(first, pieces, "ttft_p99", VERMILION, "p99", 1e3)
        _curve(memory, pieces, "resident_mib", GREEN, "all processes of the server, with mapped files")
        _curve(memory, pieces, "own_mib", BLUE, "without files")
        _curve(memory, pieces, "client_mib", GREY, "the load test")
        rate.set(title="output tokens/s", ylim=(0, None))
        first.set(title="time to first token, ms", yscale="log")
        memory.set(title="memory, MiB", ylim=(0, None), xlabel="minutes")
        for axis in (rate, first, memory):
            _events(axis, record["events"])
            axis.title.set_fontsize(10)
            axis.legend(fontsize=8, loc="center right")
    return file


def _curve(axis: Any, pieces: list[dict[str, Any]], name: str, colour: str, label: str, scale: float = 1.0) -> None:
    found = [((p["at"] + p["seconds"] / 2) / 60, scale * p[name]) for p in pieces if p[name] is not None]
    if found:
        axis.plot(*zip(*found, strict=True), color=colour, lw=1.2, label=label)


def _events(axis: Any, events: list[list[Any]]) -> None:
    for kind, label, colour in (
        ("reload", "collection reloaded", GREY),
        ("reload, other bases", "… with other bases", ORANGE),
    ):
        for i, (_, called, _, _) in enumerate(event for event in events if event[0] == kind):
            axis.axvline(called / 60, color=colour, lw=0.8, alpha=0.7, label=None if i else label)
    calls = [called / 60 for kind, called, _, _ in events if not kind.startswith("reload")]
    axis.plot(calls, [0.02] * len(calls), "|", color=GREY, ms=5, transform=axis.get_xaxis_transform())


def last_record(results: Path) -> dict[str, Any]:
    """Raises: JDLoRAError: there is none."""
    records = [record for _, record in read_lines(results)] if results.exists() else []
    if not records:
        raise JDLoRAError(f"{results}: no soak to draw; run `make soak` first")
    found: dict[str, Any] = records[-1]
    return found


def main() -> None:
    draw_anew(__doc__, RESULTS, PICTURE, lambda results, picture: plot(last_record(results), picture))


if __name__ == "__main__":
    main()
