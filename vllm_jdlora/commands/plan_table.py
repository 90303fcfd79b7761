"""A plan as a table and a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_jdlora.commands import plan_traffic
from vllm_jdlora.commands.terminal import printable, readable_bytes
from vllm_jdlora.serving.options import SCALING_BYTES


def print_plan(facts: dict[str, Any]) -> None:
    """``facts`` as ``jdlora plan --json`` gives them."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    whole, slot = facts["bytes"]["adapters"], facts["bytes"]["plain_slot"]
    show(
        f"{facts['adapters']} adapters in {facts['slices']} slices, {readable_bytes(whole)} uncompressed; a plain LoRA "
        f"slot takes {readable_bytes(slot)}"
    )
    memory, expected = facts["device_memory"], facts["adapters_expected"]
    with_errors = facts["choices"][0]["relative_error"] is not None
    table = Table("rank", "clusters", "on disk", "share", f"on {facts['device']}", "each further", box=None)
    if with_errors:
        table.add_column("mean error")
        table.add_column("max error")
    if expected is not None:
        table.add_column(f"{expected} adapters")
    if memory is not None:
        table.add_column(f"fit in {readable_bytes(memory)}")
        table.add_column("on these bases")
    for row in facts["choices"]:
        error, disk, device = row["relative_error"], row["bytes"]["disk"], row["bytes"]["device"]
        cells = [str(row["rank"]), str(row["clusters"]), readable_bytes(disk["total"]), f"{disk['total'] / whole:.1%}"]
        cells += [readable_bytes(device["total"]), readable_bytes(device["each_adapter"])]
        if with_errors:
            cells += [f"{error['mean']:.3f}", f"{error['max']:.3f}"]
        if expected is not None:
            cells.append(readable_bytes(row["expected"]["device"]))
        if memory is not None:
            fit = (row["fit"][name] for name in ("at_this_error", "on_these_bases"))
            cells += ["any" if most is None else str(most) for most in fit]
        table.add_row(*cells)
    console.print(table)
    _print_notes(facts, show)
    if best := facts.get("recommended"):
        _print_recommended(best, show)
    if traffic := facts.get("traffic"):
        plan_traffic.show_traffic(traffic, show)


def _print_notes(facts: dict[str, Any], show: Callable[[str], None]) -> None:
    slot, memory, expected = facts["bytes"]["plain_slot"], facts["device_memory"], facts["adapters_expected"]
    if "measured_slices" in facts:
        show(f"errors: relative (not squared), predicted from {facts['measured_slices']} of {facts['slices']} slices")
    elif "collection" in facts:
        show("errors: relative (not squared), of the values as stored")
    else:
        show("errors are predicted from adapters: give a sample of them for what each row loses")
    ranks = facts["tensor_parallel_size"]
    place = facts["device"] if ranks == 1 else f"each of {ranks} {facts['device']} devices"
    show(
        f"on {place}: what a server allocates for all of them, with the slots of plain adapters; each also takes on "
        "the host what its Σ takes on disk"
    )
    most = max(row["bytes"]["device"]["each_adapter"] * facts["adapters"] for row in facts["choices"])
    if facts["scaling_slots"] is None and most > SCALING_BYTES:
        show(f"more than {readable_bytes(SCALING_BYTES)} of Σ are resident only with --jd-scaling-slots")
    if facts["unknown_slices"]:
        show(
            f"without the size of {len(facts['unknown_slices'])} slices that vLLM wraps with these, first "
            f"{facts['unknown_slices'][0]}: give --base-model"
        )
    if expected is not None:
        show(f"{expected} adapters with as many in a cluster as now; as plain slots {readable_bytes(expected * slot)}")
    if memory is not None:
        show(f"{readable_bytes(memory)} hold {memory // slot} plain LoRA slots")
    if facts.get("plain"):
        show(f"{len(facts['plain'])} more adapters are plain: {readable_bytes(facts['bytes']['plain'])}")
    if facts.get("cannot_be_compressed"):
        show(f"cannot be compressed, and kept plain: {', '.join(facts['cannot_be_compressed'])}")


def _print_recommended(best: dict[str, Any], show: Callable[[str], None]) -> None:
    error = best["relative_error"]
    show(
        f"{best['asked']}: JD-{best['method'].capitalize()}, rank {best['rank']}, {best['clusters']} clusters, "
        f"{readable_bytes(best['total_bytes'])}, "
        f"relative error {error['mean']:.3f} (mean), {error['max']:.3f} (max)"
    )
    if best["plain"]:
        show(f"kept plain: {', '.join(best['plain'])}")
    if best["bounds"] is not None:
        show(
            f"certified for these clusters, as a root mean square over adapters and measured slices: "
            f"{best['bounds']['predicted']:.3f} is predicted, no bases of this rank get below "
            f"{best['bounds']['lower']:.3f}, none as good as their start lose more than {best['bounds']['upper']:.3f}"
        )
    show(best["command"])
