"""Plots of an evaluation: error and relative performance over bytes, performance over error, convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_jdlora.evaluation.evaluate import BASE, UNCOMPRESSED
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.summary import Estimate, Row

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "jdlora",
    "figure.constrained_layout.use": True,
}
# Okabe-Ito: told apart by colour-blind readers too; the marker says it again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vP*X"
_FLOOR = 85


def family_of(variant: str) -> str:
    """Variants named ``FAMILY: setting`` are points of one curve; any other name is a curve of its own."""
    return variant.partition(":")[0].strip()


def plot_over_bytes(rows: Sequence[Row], file: Path) -> Path:
    """Error (left) and ROUGE-L relative to the uncompressed adapters (right) over the share of bytes an adapter takes.

    The error is the output error where all rows have one. Without answers the right side shows token accuracy. What
    lies below 85 % is marked on the lower edge, so that the differences that matter stay visible.
    """
    shown = [row for row in rows if row.variant not in (BASE, UNCOMPRESSED)]
    with_answers = all(row.rouge_l is not None for row in shown)
    with_output = all(row.output_error is not None for row in shown)
    with _figure(file, 2) as (left, right):
        for i, ((name, members), look) in enumerate(zip(_families(shown).items(), _looks(), strict=False)):
            share = [row.share_of_bytes for row in members]
            errors = [row.output_error if with_output else row.relative_error for row in members]
            left.plot(share, errors, **look, label=name)
            found = [_performance(row, with_answers) for row in members]
            right.plot(share, [100 * e.mean for e in found], **look)
            far = [x for x, e in zip(share, found, strict=True) if 100 * e.mean < _FLOOR]
            if far:
                # Smaller on top of larger, so that none hides another.
                right.plot(far, [_FLOOR] * len(far), color=look["color"], marker="v", ls="", ms=max(4, 14 - 2 * i))
            low, high = [100 * e.low for e in found], [100 * e.high for e in found]
            right.fill_between(share, low, high, color=look["color"], alpha=0.12, lw=0)
        left.set(ylabel=("output error" if with_output else "relative error") + ", mean (not squared)")
        left.set_ylim(bottom=0)
        right.axhline(100, color="#444444", lw=1, ls="--")
        right.set(ylabel=("ROUGE-L" if with_answers else "token accuracy") + ", % of uncompressed")
        right.set_ylim(bottom=max(_FLOOR, right.get_ylim()[0]))
        ticks = _share_ticks([row.share_of_bytes for row in shown])
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [_share_label(tick) for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel("bytes for each adapter, share of uncompressed")
        if shown:
            left.legend()
    return file


def plot_performance_over_error(records: Sequence[Record], file: Path) -> Path:
    """One point for each adapter and variant: ROUGE-L relative to the uncompressed adapter over the error."""
    own = [record for record in records if record.adapter == record.task]
    reference = {record.adapter: record for record in own if record.variant == UNCOMPRESSED}
    shown = [record for record in own if record.variant not in (BASE, UNCOMPRESSED)]
    with_answers = all(record.answers for record in own)
    with_output = all(record.output_error is not None for record in shown)
    families: dict[str, list[Record]] = {}
    for record in shown:
        families.setdefault(family_of(record.variant), []).append(record)
    with _figure(file, 1) as (axis,):
        for (name, members), look in zip(sorted(families.items()), _looks(), strict=False):
            points = []
            for record in members:
                mine, theirs = (
                    r.rouge_l if with_answers else r.token_accuracy for r in (record, reference[record.adapter])
                )
                if mine is not None and theirs:
                    points.append((record.output_error if with_output else record.relative_error, 100 * mine / theirs))
            if points:
                axis.scatter(*zip(*points, strict=True), s=16, alpha=0.55, lw=0, color=look["color"], label=name)
        axis.axhline(100, color="#444444", lw=1, ls="--")
        axis.set(
            xlabel=("output error" if with_output else "relative error") + " of the adapter (not squared)",
            ylabel=("ROUGE-L" if with_answers else "token accuracy") + ", % of uncompressed",
        )
        axis.set_xlim(left=0)
        if axis.collections:
            axis.legend()
    return file


def plot_convergence(objectives: Mapping[str, Sequence[float]], file: Path) -> Path:
    """The objective (share of the energy lost) after each round, one curve for each name, on a logarithmic scale."""
    with _figure(file, 1) as (axis,):
        for (name, values), look in zip(objectives.items(), _looks(), strict=False):
            axis.plot(range(1, len(values) + 1), values, **{**look, "markersize": 3}, label=name)
        axis.set(xlabel="round", ylabel="energy lost (squared relative error)", yscale="log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    return file


class _figure:
    """A figure with panels side by side, saved when the block ends well; the suffix of the file is its format."""

    def __init__(self, file: Path, panels: int):
        self.file, self.panels = Path(file), panels

    def __enter__(self) -> Sequence[Any]:
        import matplotlib
        from matplotlib.figure import Figure

        self._style = matplotlib.rc_context(_STYLE)
        self._style.__enter__()
        self.figure = Figure(figsize=(5.2 * self.panels, 3.8))
        return self.figure.subplots(1, self.panels, squeeze=False)[0]

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.file.with_name(f".new-{self.file.name}")
                # No date in it: the same data gives the same file.
                dated = {"metadata": {"Date": None}} if self.file.suffix == ".svg" else {"dpi": 160}
                self.figure.savefig(temporary, **dated)
                temporary.replace(self.file)
        finally:
            self._style.__exit__(None, None, None)


def _families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.share_of_bytes):
        families.setdefault(family_of(row.variant), []).append(row)
    return dict(sorted(families.items()))


def _looks() -> Iterable[dict[str, Any]]:
    index = 0
    while True:
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]
        yield {"color": colour, "marker": marker, "lw": 1.6, "markersize": 5}
        index += 1


def _performance(row: Row, with_answers: bool) -> Estimate:
    """Not a number, so not drawn, where the uncompressed adapters score nothing."""
    found = row.relative_rouge_l if with_answers else row.relative_token_accuracy
    return found or Estimate(math.nan, math.nan, math.nan, math.nan, "")


def _share_ticks(shares: Sequence[float]) -> list[float]:
    """Powers of 1/2 around the shares there are."""
    if not shares:
        return [1.0]
    return [2.0**-n for n in range(12) if min(shares) / 1.5 <= 2.0**-n <= max(shares) * 1.5]


def _share_label(tick: float) -> str:
    return "1" if tick == 1 else f"1/{round(1 / tick)}"
