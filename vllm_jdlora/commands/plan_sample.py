"""A plan from a sample of adapters: error curves, choices for a budget, and the command that makes the best one."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.byte_budget import ByteBudget, byte_budget
from vllm_jdlora.commands.terminal import progress_bars, readable_bytes
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.commands.plan_room import Room
    from vllm_jdlora.jd.budget import Choice, Sizes
    from vllm_jdlora.jd.error_curves import ErrorCurves
    from vllm_jdlora.jd.problem import SliceProblem

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4}
PLAIN_WIDTH = 2
"""Bytes of a number of a plain adapter: bf16 or fp16 on disk."""
_DEFAULT_BUDGET = "1/8"


def of_adapters(args: argparse.Namespace) -> tuple[dict[str, Any], Room, dict[str, tuple[int, int]]]:
    """A plan from adapters that are there: facts, where things go, and the slices' (d_out, d_in) by name."""
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.base_model import of_one_base_model
    from vllm_jdlora.collection.build import threads_for
    from vllm_jdlora.collection.source import AdapterSource, common_slices, sizes_of
    from vllm_jdlora.commands.plan_room import room_of
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
            dtype_width=WIDTH[args.dtype],
            quantize="none",
            always_plain=sum(PLAIN_WIDTH * a.parameters for a in everything if a.plain_only),
        )
        measured = measured_slices(weighted)
        diagonal = replace(sizes, diagonal=True)
        with threads_for(adapters, slices):
            choice, asked = _chosen(args, curves, sizes, partial(_diagonal, measured, curves, diagonal, show))
            full = choice.method == "full"
            bounds = certify_clusters(measured, choice.cluster, choice.rank) if full else None
    shapes = shapes_of(slices)
    room, facts = room_of(args, sizes, shapes, max(a.rank for a in adapters))
    # A server's buffers have one width, and its plain adapters must fit into them.
    width = max([room.device.max_lora_rank, *(adapters[i].rank for i in choice.plain)])
    device = replace(room.device, diagonal=not full, max_lora_rank=width)
    chosen = replace(room, sizes=sizes if full else diagonal, device=device, plain=choice.plain)
    return (
        {
            **facts,
            "adapters": len(adapters),
            "cannot_be_compressed": [a.name for a in everything if a.plain_only],
            "measured_slices": len(measured),
            "dtype": args.dtype,
            "bytes": {"adapters": sizes.uncompressed, "plain_slot": room.plain_slot},
            "choices": [
                room.row(c.clusters, c.rank) | {"method": "full", "relative_error": _errors(c)}
                for c in frontier(curves, sizes)
            ],
            "recommended": chosen.row(choice.clusters, choice.rank)
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
        },
        room,
        shapes,
    )


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


def shapes_of(slices: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of slices by name."""
    return {part.name: (part.d_out, part.d_in) for part in slices}


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
