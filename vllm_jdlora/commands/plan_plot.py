"""`jdlora plan --plot`: device memory over the number of adapters, compressed and as slots of plain LoRA."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.plan_room import Room
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.plot_style import COLOURS, REFERENCE_COLOUR, REFERENCE_LINE, SavedFigure

_MOST_CURVES = 6
_GIB = 1 << 30
_COUNTS = [m * 10**e for e in range(6) for m in (1, 2, 5)] + [10**6]


def plot(rows: Sequence[dict[str, Any]], room: Room, file: Path) -> Path:
    """Draw curves for a few of the rows, from the least to the most bytes.

    Raises:
        JDLoRAError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise JDLoRAError("--plot needs matplotlib: pip install 'vllm-jdlora[evaluate]'")
    ordered = sorted(rows, key=lambda row: row["bytes"]["device"]["total"])
    step = max(1, -(-len(ordered) // _MOST_CURVES))
    with SavedFigure(file, 7.2, 4.2) as ((axis,),):
        plain = [count * room.plain_slot / _GIB for count in _COUNTS]
        axis.plot(_COUNTS, plain, color=REFERENCE_COLOUR, label=f"plain LoRA slots of rank {room.adapter_rank}")
        for row, colour in zip(ordered[::step], COLOURS, strict=False):
            counts = [count for count in _COUNTS if count >= room.sizes.n / row["clusters"]]
            used = [room.device_for(count, row["clusters"], row["rank"]) / _GIB for count in counts]
            each = room.sizes.n / row["clusters"]
            axis.plot(counts, used, color=colour, label=f"rank {row['rank']}, {each:.0f} adapters in a cluster")
        if room.memory is not None:
            axis.axhline(room.memory / _GIB, **REFERENCE_LINE)
        axis.set(xscale="log", yscale="log", xlabel="adapters", ylabel="GiB on the device")
        axis.legend()
    return file
