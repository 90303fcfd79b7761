"""`jdlora plan`: bytes and predicted errors for each rank and number of clusters, and how many adapters fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands import plan_sample, plan_traffic
from vllm_jdlora.commands.byte_budget import byte_budget, size_in_bytes
from vllm_jdlora.commands.plan_sample import PLAIN_WIDTH, WIDTH, shapes_of
from vllm_jdlora.commands.terminal import positive
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.commands.plan_room import Room

_RANKS, _IN_A_CLUSTER = (8, 16, 32, 64), (8, 16, 32, 64)
"""Shown where there is no adapter to measure: ranks, and adapters in a cluster."""


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", help="bytes and errors to expect for each rank and number of clusters, and how many adapters fit"
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="ADAPTER | COLLECTION",
        help="PEFT folders, or one collection; none to plan from --base-model alone, without errors",
    )
    sizes = parser.add_argument_group("what to plan for")
    sizes.add_argument("--max-error", type=float, metavar="E", help="relative error that no adapter may exceed")
    sizes.add_argument(
        "--max-bytes", type=byte_budget, metavar="B", help="bytes in all (10MiB, 1GiB, 25%%, 1/8; default: 1/8)"
    )
    sizes.add_argument("--device-memory", type=size_in_bytes, metavar="M", help="room for adapters (8GiB)")
    sizes.add_argument("--adapters-expected", type=positive, metavar="N", help="plan for so many adapters of the kind")
    sizes.add_argument("--dtype", choices=sorted(WIDTH), default="bf16", help="of bases and Σ (default: bf16)")
    sizes.add_argument("--seed", type=int, default=0, help="of the clustering's starts (default: 0)")
    model = parser.add_argument_group("the base model")
    model.add_argument(
        "--base-model", metavar="MODEL", help="folder with its config.json, or name; buffers are then counted exactly"
    )
    model.add_argument("--adapter-rank", type=positive, metavar="R", help="of the adapters, where none is given")
    model.add_argument("--target-modules", metavar="A,B,…", help="that they change (q_proj,v_proj), likewise")
    server = parser.add_argument_group("the server, whose buffers are counted")
    server.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    server.add_argument("--max-loras", type=positive, default=1, metavar="D", help="plain adapters (default: 1)")
    server.add_argument(
        "--max-lora-rank", type=positive, default=16, metavar="R", help="least rank of buffers (default: 16, as vLLM's)"
    )
    server.add_argument(
        "--jd-base-bits", type=int, choices=(8, 16), help="of the bases (default: 16; on CPU as they are stored)"
    )
    server.add_argument("--jd-base-slots", type=positive, metavar="N", help="resident clusters (default: all)")
    server.add_argument("--jd-scaling-slots", type=positive, metavar="N", help="resident Σ (default: all)")
    server.add_argument(
        "--tensor-parallel-size", type=positive, default=1, metavar="N", help="bytes are then of one rank's device"
    )
    plan_traffic.add_argument(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="device memory over adapters, as SVG or PNG")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection.schema import MANIFEST_FILE
    from vllm_jdlora.commands.plan_table import print_plan

    if args.max_error is not None and not 0 < args.max_error <= 1:
        raise JDLoRAError(f"--max-error is a relative error above 0 and up to 1, not {args.max_error:g}")
    if not args.paths:
        facts, room, shapes = _of_model(args)
    elif args.adapter_rank is not None or args.target_modules is not None:
        raise JDLoRAError("--adapter-rank and --target-modules describe adapters where none is given: leave them out")
    elif len(args.paths) == 1 and (args.paths[0] / MANIFEST_FILE).is_file():
        if args.max_error is not None or args.max_bytes is not None:
            raise JDLoRAError(f"{args.paths[0]}: is made already; budgets are for adapters (give their folders)")
        facts, room, shapes = _of_collection(args)
    else:
        facts, room, shapes = plan_sample.of_adapters(args)
    if args.traffic is not None:
        size = facts.get("recommended", facts["choices"][0])
        facts["traffic"] = plan_traffic.traffic_of(
            [(name, d_out, d_in) for name, (d_out, d_in) in shapes.items()],
            rank=size["rank"],
            clusters=size["clusters"],
            adapter_rank=facts["adapter_rank"],
            diagonal=size["method"] == "diag",
            card=args.traffic,
        )
    if args.plot is not None:
        from vllm_jdlora.commands.plan_plot import plot

        plot(facts["choices"], room, args.plot)
    print(json.dumps(facts, indent=1)) if args.json else print_plan(facts)
    return 0


def _of_model(args: argparse.Namespace) -> tuple[dict[str, Any], Room, dict[str, tuple[int, int]]]:
    """A plan for adapters that are only described."""
    from vllm_jdlora.commands.plan_model import linear_layers, targets_of
    from vllm_jdlora.commands.plan_room import room_of
    from vllm_jdlora.jd.budget import Sizes

    wanted = {"--base-model": args.base_model, "--adapters-expected": args.adapters_expected}
    wanted |= {"--adapter-rank": args.adapter_rank, "--target-modules": args.target_modules}
    if missing := [flag for flag, value in wanted.items() if not value]:
        raise JDLoRAError(f"give adapters, a collection, or a description of adapters: {', '.join(missing)} is missing")
    if args.max_error is not None or args.max_bytes is not None:
        raise JDLoRAError("errors are predicted from adapters: give a sample of them with --max-error or --max-bytes")
    shapes = targets_of(linear_layers(args.base_model), args.target_modules.split(","))
    n = args.adapters_expected
    each = PLAIN_WIDTH * args.adapter_rank * sum(d_out + d_in for d_out, d_in in shapes.values())
    width = WIDTH[args.dtype]
    sizes = Sizes(
        slices=tuple(shapes.values()),
        plain=(each,) * n,
        basis_width=1 if args.jd_base_bits == 8 else width,
        scale_width=4 if args.jd_base_bits == 8 else 0,
        sigma_width=width,
    )
    room, facts = room_of(args, sizes, shapes, args.adapter_rank)
    # All of them are there already: nothing is to be grown to.
    room, facts = replace(room, expected=None), facts | {"adapters_expected": None}
    clusters = sorted({1, *(max(1, n // members) for members in _IN_A_CLUSTER)})
    rows = [room.row(k, rank) | {"method": "full", "relative_error": None} for rank in _RANKS for k in clusters]
    smaller = [row for row in rows if row["bytes"]["disk"]["total"] < sizes.uncompressed]
    return (
        {
            **facts,
            "adapters": n,
            "base_model": args.base_model,
            "dtype": args.dtype,
            "bytes": {"adapters": sizes.uncompressed, "plain_slot": room.plain_slot},
            "choices": sorted(smaller or rows, key=lambda row: row["bytes"]["device"]["total"]),
        },
        room,
        shapes,
    )


def _of_collection(args: argparse.Namespace) -> tuple[dict[str, Any], Room, dict[str, tuple[int, int]]]:
    from vllm_jdlora.adapter import read_adapter
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.commands.plan_room import room_of
    from vllm_jdlora.jd.budget import Sizes

    collection = Collection.open(args.paths[0], verify=False)
    manifest = collection.manifest
    sizes = Sizes(
        slices=tuple((part.d_out, part.d_in) for part in manifest.slices),
        plain=tuple(PLAIN_WIDTH * a.parameters for a in manifest.adapters),
        basis_width=WIDTH[manifest.dtype] if manifest.quantize == "none" else 1,
        scale_width=0 if manifest.quantize == "none" else 4,
        sigma_width=WIDTH[manifest.dtype],
        diagonal=manifest.method == "diag",
        always_plain=sum(PLAIN_WIDTH * p.parameters for p in manifest.plain),
    )
    shapes = shapes_of(manifest.slices)
    plain_ranks = [p.rank for p in manifest.plain]
    rank = max([a.rank for a in manifest.adapters] + plain_ranks)
    # A server's buffers have one width, and its plain adapters must fit into them; it wraps what they change as well.
    args = argparse.Namespace(**{**vars(args), "max_lora_rank": max([args.max_lora_rank, *plain_ranks])})
    plain = [read_adapter(collection.plain_path(entry.name), entry.name) for entry in manifest.plain]
    of_plain = shapes_of(part.shape for adapter in plain if not adapter.plain_only for part in adapter.slices.values())
    room, facts = room_of(args, sizes, shapes, rank, of_plain=of_plain)
    errors = [a.relative_error for a in manifest.adapters]
    squared = sum(e * e for e in errors) / len(errors)
    return (
        {
            **facts,
            "collection": str(args.paths[0]),
            "adapters": len(manifest.adapters),
            "plain": [p.name for p in manifest.plain],
            "dtype": manifest.dtype,
            "bytes": {"adapters": sizes.uncompressed, "plain_slot": room.plain_slot, "plain": sizes.always_plain},
            "choices": [
                room.row(manifest.clusters, manifest.rank)
                | {
                    "method": manifest.method,
                    "relative_error": {"mean": sum(errors) / len(errors), "max": max(errors), "mean_squared": squared},
                }
            ],
        },
        room,
        shapes,
    )
