"""`jdlora plan`: bytes and predicted errors for each rank and number of clusters, and how many adapters fit."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands import plan_traffic
from vllm_jdlora.commands.byte_budget import ByteBudget, byte_budget, size_in_bytes
from vllm_jdlora.commands.terminal import positive, printable, progress_bars, readable_bytes
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.jd.budget import Choice, Sizes
    from vllm_jdlora.jd.error_curves import ErrorCurves
    from vllm_jdlora.jd.problem import SliceProblem

_WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
_PLAIN_WIDTH = 2
"""Bytes of a number of a plain adapter: bf16 or fp16 on the device."""
_DEFAULT_BUDGET = "1/8"


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="bytes and errors to expect for each rank and number of clusters, and how many adapters fit"
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="ADAPTER | COLLECTION", help="PEFT folders, or one collection"
    )
    parser.add_argument("--max-error", type=float, metavar="E", help="relative error that no adapter may exceed")
    parser.add_argument(
        "--max-bytes", type=byte_budget, metavar="B", help="bytes in all (10MiB, 1GiB, 25%%, 1/8; default: 1/8)"
    )
    parser.add_argument("--device-memory", type=size_in_bytes, metavar="M", help="room for adapters (8GiB)")
    parser.add_argument("--adapters-expected", type=positive, metavar="N", help="plan for so many adapters of the kind")
    plan_traffic.add_argument(parser)
    parser.add_argument("--dtype", choices=sorted(_WIDTH), default="bf16", help="of bases and Σ (default: bf16)")
    parser.add_argument("--seed", type=int, default=0, help="of the clustering's starts (default: 0)")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection.schema import MANIFEST_FILE

    if args.max_error is not None and not 0 < args.max_error <= 1:
        raise JDLoRAError(f"--max-error is a relative error above 0 and up to 1, not {args.max_error:g}")
    if len(args.paths) == 1 and (args.paths[0] / MANIFEST_FILE).is_file():
        if args.max_error is not None or args.max_bytes is not None:
            raise JDLoRAError(f"{args.paths[0]}: is made already; budgets are for adapters (give their folders)")
        facts = _of_collection(args)
    else:
        facts = _of_adapters(args)
    if args.traffic is None:
        del facts["shapes"]
    else:
        size = facts.get("recommended", facts["choices"][0])
        facts["traffic"] = plan_traffic.traffic_of(
            facts.pop("shapes"),
            rank=size["rank"],
            clusters=size["clusters"],
            adapter_rank=facts["adapter_rank"],
            diagonal=size["method"] == "diag",
            card=args.traffic,
        )
    print(json.dumps(facts, indent=1)) if args.json else _print(facts)
    return 0


@dataclass(frozen=True)
class _Room:
    """What the user wants to fit: memory of the device in bytes, and how many adapters there will be."""

    memory: int | None
    expected: int | None

    def row(self, sizes: Sizes, clusters: int, rank: int, slot: int) -> dict[str, Any]:
        """Bytes of one rank and number of clusters; with more adapters, as many of them in a cluster as now."""
        n, bases, each = sizes.n, sizes.bases(clusters, rank), sizes.scaling(rank)
        row: dict[str, Any] = {
            "rank": rank,
            "clusters": clusters,
            "bytes": {"bases": bases, "each_adapter": each, "device": bases + n * each},
        }
        if self.expected is not None:
            grown = math.ceil(clusters * self.expected / n)
            row["expected"] = {
                "clusters": grown,
                "device": sizes.bases(grown, rank) + self.expected * each,
                "plain_slots": self.expected * slot,
            }
        if self.memory is not None:
            row["fit"] = {
                "at_this_error": self.memory * n // (bases + n * each),
                "on_these_bases": max(0, self.memory - bases) // each,
                "plain_slots": self.memory // slot,
            }
        return row


def _of_adapters(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.base_model import of_one_base_model
    from vllm_jdlora.collection.build import threads_for
    from vllm_jdlora.collection.source import AdapterSource, common_slices, sizes_of
    from vllm_jdlora.jd.budget import frontier
    from vllm_jdlora.jd.certificate import certify_clusters
    from vllm_jdlora.jd.clustering import weighted_slices
    from vllm_jdlora.jd.error_curves import curves_of
    from vllm_jdlora.jd.measured_slices import measured_slices

    with progress_bars() as show:
        show("read adapters", 0, 1)
        everything, _ = read_adapters(args.paths)
        of_one_base_model(everything, None)
        show("read adapters", 1, 1)
        adapters = [a for a in everything if not a.plain_only]
        if not adapters:
            raise JDLoRAError(f"no adapter can be compressed: {everything[0].name} has {everything[0].plain_only}")
        slices = common_slices(adapters)
        with threads_for(adapters, slices):
            weighted = weighted_slices(AdapterSource(adapters, slices), None, args.seed)
            curves = curves_of(weighted, seed=args.seed, progress=show)
        sizes = sizes_of(
            adapters,
            slices,
            dtype_width=_WIDTH[args.dtype],
            quantize="none",
            always_plain=sum(_PLAIN_WIDTH * a.parameters for a in everything if a.plain_only),
        )
        measured = measured_slices(weighted)
        diagonal = replace(sizes, diagonal=True)
        with threads_for(adapters, slices):
            choice, asked = _chosen(args, curves, sizes, partial(_diagonal, measured, curves, diagonal, show))
            full = choice.method == "full"
            bounds = certify_clusters(measured, choice.cluster, choice.rank) if full else None
    room = _Room(args.device_memory, args.adapters_expected)
    slot = _slot_bytes(sizes, max(a.rank for a in adapters))
    return {
        "adapters": len(adapters),
        "adapter_rank": max(a.rank for a in adapters),
        "shapes": [(part.name, part.d_out, part.d_in) for part in slices],
        "cannot_be_compressed": [a.name for a in everything if a.plain_only],
        "slices": len(slices),
        "measured_slices": len(measured),
        "dtype": args.dtype,
        "bytes": {"adapters": sizes.uncompressed, "plain_slot": slot},
        "device_memory": args.device_memory,
        "adapters_expected": args.adapters_expected,
        "choices": [
            room.row(sizes, c.clusters, c.rank, slot) | {"relative_error": _errors(c)} for c in frontier(curves, sizes)
        ],
        "recommended": room.row(sizes if full else diagonal, choice.clusters, choice.rank, slot)
        | {
            "method": choice.method,
            "asked": asked,
            "relative_error": _errors(choice),
            "bounds": None
            if bounds is None
            else {
                "lower": bounds.relative[0],
                "predicted": curves.root_mean_square(choice.clusters, choice.rank),
                "upper": bounds.relative[1],
            },
            "plain": [adapters[i].name for i in choice.plain],
            "total_bytes": choice.bytes,
            "command": _command(args, choice),
        },
    }


def _diagonal(
    measured: Sequence[SliceProblem], curves: ErrorCurves, sizes: Sizes, show: Any, max_bytes: int
) -> list[Choice]:
    """What JD-Diag would lose in so many bytes, in the clusters of the curves; nothing where nothing fits."""
    from vllm_jdlora.jd.byte_choice import candidates, compared

    labels = dict(zip(curves.clusters, curves.labels, strict=True))
    try:
        tried = candidates({"diag": sizes}, max_bytes)
    except JDLoRAError:
        return []
    return compared(measured, curves.n, [each for each in tried if each.clusters in labels], labels, show)


def _chosen(
    args: argparse.Namespace, curves: ErrorCurves, sizes: Sizes, diagonal: Callable[[int], list[Choice]]
) -> tuple[Choice, str]:
    """The choice for the budgets given, and the budgets in words."""
    from vllm_jdlora.jd.budget import best_of, choose_for_bytes, choose_for_error, frontier

    def within(max_bytes: int) -> Choice:
        return best_of([choose_for_bytes(curves, sizes, max_bytes), *diagonal(max_bytes)])

    budget: ByteBudget | None = args.max_bytes
    if args.max_error is not None:
        choice = choose_for_error(curves, sizes, args.max_error)
        if budget is not None and choice.bytes > budget.of(sizes.uncompressed):
            raise JDLoRAError(
                f"a relative error of at most {args.max_error:g} takes {readable_bytes(choice.bytes)}, more than "
                f"--max-bytes {budget.text} ({readable_bytes(budget.of(sizes.uncompressed))}): give up one of the two"
            )
        return choice, f"fewest bytes at a relative error of at most {args.max_error:g}"
    if budget is not None:
        return within(budget.of(sizes.uncompressed)), f"least error in {budget.text}"
    smallest = frontier(curves, sizes)[0]
    allowed = byte_budget(_DEFAULT_BUDGET).of(sizes.uncompressed)
    if smallest.bytes > allowed:
        return smallest, f"the smallest: {_DEFAULT_BUDGET} of the adapters' bytes is too little for so few of them"
    return within(allowed), f"least error in {_DEFAULT_BUDGET} of the adapters' bytes"


def _of_collection(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.jd.budget import Sizes

    manifest = Collection.open(args.paths[0], verify=False).manifest
    sizes = Sizes(
        slices=tuple((part.d_out, part.d_in) for part in manifest.slices),
        plain=tuple(_PLAIN_WIDTH * a.parameters for a in manifest.adapters),
        basis_width=_WIDTH[manifest.dtype] if manifest.quantize == "none" else 1,
        scale_width=0 if manifest.quantize == "none" else 4,
        sigma_width=_WIDTH[manifest.dtype],
        diagonal=manifest.method == "diag",
        always_plain=sum(_PLAIN_WIDTH * p.parameters for p in manifest.plain),
    )
    slot = _slot_bytes(sizes, max([a.rank for a in manifest.adapters] + [p.rank for p in manifest.plain]))
    errors = [a.relative_error for a in manifest.adapters]
    made = _Room(args.device_memory, args.adapters_expected).row(sizes, manifest.clusters, manifest.rank, slot)
    squared = sum(e * e for e in errors) / len(errors)
    return {
        "collection": str(args.paths[0]),
        "adapters": len(manifest.adapters),
        "adapter_rank": max(a.rank for a in manifest.adapters),
        "shapes": [(part.name, part.d_out, part.d_in) for part in manifest.slices],
        "plain": [p.name for p in manifest.plain],
        "slices": len(manifest.slices),
        "dtype": manifest.dtype,
        "bytes": {"adapters": sizes.uncompressed, "plain_slot": slot, "plain": sizes.always_plain},
        "device_memory": args.device_memory,
        "adapters_expected": args.adapters_expected,
        "choices": [
            made
            | {
                "method": manifest.method,
                "relative_error": {"mean": sum(errors) / len(errors), "max": max(errors), "mean_squared": squared},
            }
        ],
    }


def _slot_bytes(sizes: Sizes, rank: int) -> int:
    """Bytes of one slot of vLLM's multi-LoRA: A and B of the largest rank in every slice."""
    return _PLAIN_WIDTH * rank * sum(d_out + d_in for d_out, d_in in sizes.slices)


def _errors(choice: Choice) -> dict[str, float]:
    return {"mean": choice.mean_error, "max": choice.max_error, "mean_squared": choice.mean_squared_error}


def _command(args: argparse.Namespace, choice: Choice) -> str:
    parts = ["jdlora", "compress", *map(str, args.paths), "-o", "COLLECTION"]
    parts += ["--rank", str(choice.rank), "--clusters", str(choice.clusters), "--method", choice.method]
    if args.max_error is not None:
        parts += ["--max-error", f"{args.max_error:g}"]
    if args.dtype != "bf16":
        parts += ["--dtype", args.dtype]
    if args.seed != 0:
        parts += ["--seed", str(args.seed)]
    return shlex.join(parts)


def _print(facts: dict[str, Any]) -> None:
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
    table = Table("rank", "clusters", "on device", "share", "each further", "mean error", "max error", box=None)
    if expected is not None:
        table.add_column(f"{expected} adapters")
    if memory is not None:
        table.add_column(f"fit in {readable_bytes(memory)}")
        table.add_column("on these bases")
    for row in facts["choices"]:
        error, size = row["relative_error"], row["bytes"]
        cells = [str(row["rank"]), str(row["clusters"]), readable_bytes(size["device"])]
        cells += [f"{size['device'] / whole:.1%}", readable_bytes(size["each_adapter"])]
        cells += [f"{error['mean']:.3f}", f"{error['max']:.3f}"]
        if expected is not None:
            cells.append(readable_bytes(row["expected"]["device"]))
        if memory is not None:
            cells += [str(row["fit"]["at_this_error"]), str(row["fit"]["on_these_bases"])]
        table.add_row(*cells)
    console.print(table)
    if "measured_slices" in facts:
        show(f"errors: relative (not squared), predicted from {facts['measured_slices']} of {facts['slices']} slices")
    else:
        show("errors: relative (not squared), of the values as stored")
    if expected is not None:
        show(f"{expected} adapters with as many in a cluster as now; as plain slots {readable_bytes(expected * slot)}")
    if memory is not None:
        show(f"{readable_bytes(memory)} hold {memory // slot} plain LoRA slots")
    if facts.get("plain"):
        show(f"{len(facts['plain'])} more adapters are plain: {readable_bytes(facts['bytes']['plain'])}")
    if facts.get("cannot_be_compressed"):
        show(f"cannot be compressed, and kept plain: {', '.join(facts['cannot_be_compressed'])}")
    if best := facts.get("recommended"):
        _print_recommended(best, show)
    if traffic := facts.get("traffic"):
        plan_traffic.show_traffic(traffic, show)


def _print_recommended(best: dict[str, Any], show: Any) -> None:
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
