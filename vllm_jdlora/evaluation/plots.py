"""Plots of an evaluation: error and performance over bytes, performance over error, clusters, convergence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from vllm_jdlora.evaluation.evaluate import BASE, UNCOMPRESSED
from vllm_jdlora.evaluation.plot_style import COLOURS, REFERENCE_LINE, SavedFigure
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.summary import Estimate, Row

_MARKERS = "osD^vP*X"
_FLOOR = 85
# Rises of the loss (nats a token) up to this are drawn on a linear scale.
_SMALL = 0.01
# Errors that differ by more than this factor are drawn on a logarithmic scale; more curves have a legend outside.
_WIDE, _MANY = 10, 8
# Curves of so many points have no markers.
_DENSE = 20


def family_of(variant: str) -> str:
    """Variants named ``FAMILY: setting`` are points of one curve; any other name is a curve of its own."""
    return variant.partition(":")[0].strip()


def plot_over_bytes(rows: Sequence[Row], file: Path) -> Path:
    """Error (left) and ROUGE-L relative to the uncompressed adapters (right) over the share of bytes an adapter takes.

    The error is the output error where all rows have one. Rows without answers are left out on the right; where none
    has any, it shows by how much the loss of a token rises. Intervals are shaded: of ours alone where there are many
    curves.
    """
    shown = [row for row in rows if row.variant not in (BASE, UNCOMPRESSED)]
    with_answers = any(row.rouge_l is not None for row in shown)
    with_output = all(row.output_error is not None for row in shown)
    families = _families(shown)
    many = len(families) > _MANY
    with _panels(file, 2, beside=many) as ((left, right),):
        for i, ((name, members), look) in enumerate(zip(families.items(), _looks(), strict=False)):
            share = [row.share_of_bytes for row in members]
            errors = [row.output_error if with_output else row.relative_error for row in members]
            left.plot(share, errors, **look, label=name)
            found = [_relative_rouge(row) if with_answers else row.loss_change for row in members]
            scale = 100 if with_answers else 1
            right.plot(share, [scale * e.mean for e in found], **look)
            far = [x for x, e in zip(share, found, strict=True) if with_answers and 100 * e.mean < _FLOOR]
            if far:
                # Smaller on top of larger, so that none hides another.
                right.plot(far, [_FLOOR] * len(far), color=look["color"], marker="v", ls="", ms=max(4, 14 - 2 * i))
            if not many or name.startswith("ours"):
                low, high = [scale * e.low for e in found], [scale * e.high for e in found]
                right.fill_between(share, low, high, color=look["color"], alpha=0.12, lw=0)
        left.set(ylabel=("output error" if with_output else "relative error") + ", mean (not squared)")
        _error_scale(left.yaxis, [row.output_error if with_output else row.relative_error for row in shown])
        if with_answers:
            _percent_scale(right)
        else:
            right.set(ylabel="loss of a token above the uncompressed, nats")
            right.axhline(0, **REFERENCE_LINE)
            _loss_scale(right, [row.loss_change.mean for row in shown])
        ticks = _share_ticks([row.share_of_bytes for row in shown])
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [_share_label(tick) for tick in ticks])
            axis.xaxis.minorticks_off()
            axis.set_xlabel("bytes for each adapter, share of uncompressed")
        _legend(left)
    return file


def plot_performance_over_error(records: Sequence[Record], file: Path) -> Path:
    """One point for each adapter and variant: ROUGE-L relative to the uncompressed adapter over the error.

    Records without answers are left out; where none has any, it shows token accuracy.
    """
    own = [record for record in records if record.adapter == record.task]
    reference = {record.adapter: record for record in own if record.variant == UNCOMPRESSED}
    shown = [record for record in own if record.variant not in (BASE, UNCOMPRESSED)]
    with_answers = any(record.answers for record in shown)
    with_output = all(record.output_error is not None for record in shown)
    families: dict[str, list[Record]] = {}
    for record in shown:
        families.setdefault(family_of(record.variant), []).append(record)
    with _panels(file, 1, beside=len(families) > _MANY) as ((axis,),):
        for name, look in zip(sorted(families, key=_ours_first), _looks(), strict=False):
            members = families[name]
            points = []
            for record in members:
                mine, theirs = (
                    r.rouge_l if with_answers else r.token_accuracy for r in (record, reference[record.adapter])
                )
                if mine is not None and theirs:
                    points.append((record.output_error if with_output else record.relative_error, 100 * mine / theirs))
            if points:
                shape = {"color": look["color"], "marker": look["marker"], "s": 16, "alpha": 0.55, "lw": 0}
                # The first on top: ours.
                axis.scatter(*zip(*points, strict=True), **shape, label=name, zorder=3 - len(axis.collections) / 100)
        axis.axhline(100, **REFERENCE_LINE)
        axis.set(
            xlabel=("output error" if with_output else "relative error") + " of the adapter (not squared)",
            ylabel=("ROUGE-L" if with_answers else "token accuracy") + ", % of uncompressed",
        )
        _error_scale(axis.xaxis, [record.output_error if with_output else record.relative_error for record in shown])
        _legend(axis)
    return file


def plot_convergence(objectives: Mapping[str, Sequence[float]], file: Path) -> Path:
    """The objective (share of the energy lost) at the start and after each round, a curve for each name.

    The scale of the rounds is logarithmic, linear up to 1; that of the objective where values differ widely.
    """
    with _panels(file, 1) as ((axis,),):
        for (name, values), look in zip(objectives.items(), _looks(), strict=False):
            marked = {"markersize": 3} if len(values) < _DENSE else {"marker": ""}
            axis.plot(range(len(values)), values, **{**look, **marked}, label=name)
        axis.set(xlabel="round (0: the start)", ylabel="energy lost (squared relative error)")
        every = [value for values in objectives.values() for value in values]
        if 0 < _WIDE * min(every) < max(every):
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis)
        axis.set_xscale("symlog", linthresh=1)
        ticks = [0, *(2**n for n in range(10) if 2**n <= max(map(len, objectives.values())))]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.minorticks_off()
        axis.set_xlim(left=0)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return file


def plot_error_over_clusters(points: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Output error over the number of clusters at equal bytes, a curve for each budget and method, with the ranks.

    points: "budget", "method", "clusters", "rank", "output_error" of each.
    """
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in sorted(points, key=lambda p: (Fraction(p["budget"]), p["clusters"])):
        curves.setdefault((point["budget"], point["method"]), []).append(point)
    with _panels(file, 1) as ((axis,),):
        for ((budget, method), members), look in zip(curves.items(), _looks(), strict=False):
            x, y = [p["clusters"] for p in members], [p["output_error"] for p in members]
            axis.plot(x, y, **look, label=f"JD-{method.capitalize()}, {budget} of the bytes")
            for point in members:
                place = (point["clusters"], point["output_error"])
                axis.annotate(f"R {point['rank']}", place, (0, 5), textcoords="offset points", ha="center", size=7)
        axis.set(xlabel="clusters", ylabel="output error, mean (not squared)", yscale="log")
        _plain_ticks(axis.yaxis)
        axis.set_xscale("log", base=2)
        ticks = sorted({p["clusters"] for p in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.minorticks_off()
        _legend(axis)
    return file


def _panels(file: Path, count: int, *, beside: bool = False) -> SavedFigure:
    """Side by side, with room for a legend beside them."""
    return SavedFigure(file, 5.2 * count + 2 * beside, 3.8, ncols=count)


def _legend(axis: Any) -> None:
    """Inside the axis, or beside the figure where there are many curves."""
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > _MANY:
        axis.figure.legend(handles, labels, loc="outside right upper")
    elif labels:
        axis.legend()


def _families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    families: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.share_of_bytes):
        families.setdefault(family_of(row.variant), []).append(row)
    return {name: families[name] for name in sorted(families, key=_ours_first)}


def _ours_first(family: str) -> tuple[bool, str]:
    return not family.startswith("ours"), family


def _error_scale(axis: Any, errors: Sequence[float | None]) -> None:
    """From zero, or logarithmic where errors differ widely."""
    known = [e for e in errors if e is not None]
    if known and min(known) > 0 and max(known) > _WIDE * min(known):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        _plain_ticks(axis)
    else:
        axis.axes.set(**{f"{axis.axis_name}lim": (0, None)})


def _percent_scale(axis: Any) -> None:
    axis.axhline(100, **REFERENCE_LINE)
    axis.set(ylabel="ROUGE-L, % of uncompressed")
    axis.set_ylim(bottom=max(_FLOOR, axis.get_ylim()[0]))


def _loss_scale(axis: Any, changes: Sequence[float]) -> None:
    """Linear up to `_SMALL`, logarithmic above: small changes are told apart, and zero shows."""
    axis.set_yscale("symlog", linthresh=_SMALL, linscale=1.5)
    most = max([_SMALL, *changes])
    steps = [n * _SMALL / 4 for n in range(5)] + [m * _SMALL for m in (2, 5, 10, 20, 50, 100, 200, 500)]
    ticks = [step for step in steps if step <= 1.3 * most]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.minorticks_off()
    axis.set_ylim(min([-_SMALL / 4, *changes]), 1.3 * most)


def _plain_ticks(axis: Any) -> None:
    """0.02, 0.05, 0.1 instead of powers of ten, on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _looks() -> Iterable[dict[str, Any]]:
    index = 0
    while True:
        colour, marker = COLOURS[index % len(COLOURS)], _MARKERS[(index + index // len(COLOURS)) % len(_MARKERS)]
        line = "-" if index < len(COLOURS) else "--"
        yield {"color": colour, "marker": marker, "ls": line, "lw": 1.6, "markersize": 5}
        index += 1


def _relative_rouge(row: Row) -> Estimate:
    """Not a number, so not drawn, where there are no answers or the uncompressed adapters score nothing."""
    return row.relative_rouge_l or Estimate(math.nan, math.nan, math.nan, math.nan, "")


def _share_ticks(shares: Sequence[float]) -> list[float]:
    """Powers of 1/2 around the shares there are."""
    if not shares:
        return [1.0]
    return [2.0**-n for n in range(12) if min(shares) / 1.5 <= 2.0**-n <= max(shares) * 1.5]


def _share_label(tick: float) -> str:
    return "1" if tick == 1 else f"1/{round(1 / tick)}"
