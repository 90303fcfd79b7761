"""How every plot looks, and its file: the same data gives the same bytes, and a plot that fails leaves none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from vllm_jdlora.atomic_file import replacing

# Okabe-Ito: told apart by colour-blind readers too; where curves have markers, those say it again.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999",
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
REFERENCE_COLOUR = "#444444"
REFERENCE_LINE: Any = {"color": REFERENCE_COLOUR, "lw": 1, "ls": "--"}
"""Of the value that the others are compared with."""

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "jdlora",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "figure.constrained_layout.use": True,
}


class SavedFigure:
    """Axes [rows, columns] in the style of this package, saved when the block ends well.

    The file's suffix says the format. Its folder is made; a file that is there is replaced at once.
    """

    def __init__(self, file: Path, width: float, height: float, *, grid: bool = True, **subplots: Any):
        """width, height: inches. grid: lines behind the curves. subplots: as ``Figure.subplots`` takes them."""
        self.file, self.size, self.subplots = Path(file), (width, height), subplots
        self.style = {**_STYLE, "axes.grid": grid}

    def __enter__(self) -> Any:
        import matplotlib
        from matplotlib.figure import Figure

        self._styled = matplotlib.rc_context(self.style)
        self._styled.__enter__()
        self.figure = Figure(figsize=self.size)
        return self.figure.subplots(squeeze=False, **self.subplots)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                # No date in it: the same data gives the same file.
                dated = {"metadata": {"Date": None}} if self.file.suffix == ".svg" else {"dpi": 160}
                with replacing(self.file) as new:
                    self.figure.savefig(new, format=self.file.suffix[1:], **dated)
                    if self.file.suffix == ".svg":
                        new.write_text(_smaller(new.read_text(encoding="utf-8")), encoding="utf-8")
        finally:
            self._styled.__exit__(None, None, None)


def _smaller(svg: str) -> str:
    """The same picture in a third of the bytes: hundredths of a point, and a group's style said once."""
    svg = re.sub(
        r"(?<=[ \"])-?\d+\.\d{3,}(?=[ \"])", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), svg
    )
    svg = re.sub(r"\n\s*", "\n", svg)

    def hoisted(group: re.Match[str]) -> str:
        styles = set(re.findall(r'<use [^>]*?( style="[^"]*")/>', group[2]))
        if len(styles) != 1 or "style=" in group[1]:
            return group[0]
        style = styles.pop()
        return f"<g{group[1]}{style}>{group[2].replace(style + '/>', '/>')}</g>"

    return re.sub(r"<g([^>]*)>((?:\s*<use [^>]*/>)+\s*)</g>", hoisted, svg)
