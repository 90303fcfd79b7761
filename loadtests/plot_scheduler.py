"""A record of `results/simulate_scheduler.jsonl` as curves over the rate: throughput, swaps, and the rarest's waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_jdlora.evaluation.plot_style import BLUE, GREY, ORANGE, REFERENCE_LINE, SavedFigure

_LOOKS = {
    "first come, limits only": {"color": GREY, "marker": "s"},
    "first come, age cap": {"color": ORANGE, "marker": "^"},
    "cluster order, age cap": {"color": BLUE, "marker": "o"},
    "all bases resident": REFERENCE_LINE,
}
_PANELS = {
    "requests_per_second": "requests answered a second",
    "swaps_per_step": "bases brought to the device in a step",
    "clusters_per_step": "clusters in a step",
    "rare_wait_p99": "p99 wait of the rarest 10 %, s",
}


def plot(record: dict[str, Any], file: Path) -> Path:
    """A row of panels for each number of requests that run at once."""
    batches = sorted({row["max_num_seqs"] for row in record["rows"]})
    with SavedFigure(file, 14, 3.4 * len(batches), nrows=len(batches), ncols=len(_PANELS)) as axes:
        for line, batch in zip(axes, batches, strict=True):
            for axis, (figure, label) in zip(line, _PANELS.items(), strict=True):
                for policy, look in _LOOKS.items():
                    rows = [r for r in record["rows"] if r["policy"] == policy and r["max_num_seqs"] == batch]
                    axis.plot([r["rate"] for r in rows], [r[figure] for r in rows], label=policy, **look)
                axis.set(xlabel="requests asked for a second", ylabel=label)
                axis.set_ylim(bottom=0)
            line[0].set_title(f"{batch} requests at once, {record['base_slots']} base slots", loc="left", fontsize=10)
        axes[0, 0].legend()
    return file
