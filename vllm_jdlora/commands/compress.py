"""`jdlora compress`: PEFT adapters of one base model into a collection."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.commands.byte_budget import byte_budget
from vllm_jdlora.commands.inspect import print_report
from vllm_jdlora.commands.moments_argument import moments_from
from vllm_jdlora.commands.terminal import positive, progress_bars, refuse_existing
from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.adapter import Adapter
    from vllm_jdlora.collection.second_moments import SecondMoments


def add_to(commands: Any) -> None:
    parser = commands.add_parser("compress", help="compress PEFT adapters of one base model into a collection")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="COLLECTION", help="folder to create")
    size = parser.add_argument_group("size (default: the paper's rule for the number of adapters)")
    size.add_argument("--rank", type=positive, metavar="R", help="columns of each basis")
    size.add_argument("--clusters", type=_clusters, metavar="K|auto", help="groups of adapters that share bases")
    size.add_argument(
        "--max-bytes", type=byte_budget, metavar="B", help="least error in these bytes (10MiB, 1GiB, 25%%, 1/8)"
    )
    size.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="keep adapters with a larger error uncompressed; alone, the fewest bytes that keep the others below it",
    )
    size.add_argument("--preset", choices=["paper"], help="paper: rank and clusters by its rule, measured errors")
    fit = parser.add_argument_group("fit")
    fit.add_argument(
        "--method",
        choices=["auto", "full", "diag"],
        default="auto",
        help="Σ a matrix [R, R], or its diagonal; auto: what loses less in --max-bytes, else full (default: auto)",
    )
    fit.add_argument(
        "--metric",
        choices=["frobenius", "activation", "fisher"],
        default="frobenius",
        help="least error of ΔW, of the outputs on calibration text, or of the loss there (default: frobenius)",
    )
    fit.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text for the other metrics (.txt, .jsonl), or moments from jdlora calibrate (.safetensors)",
    )
    fit.add_argument("--seed", type=int, default=0, help="of the clustering's starts (default: 0)")
    fit.add_argument(
        "--effort", type=float, default=1.0, help="of the search for clusters; 0: starts only (default: 1)"
    )
    stored = parser.add_argument_group("storage")
    stored.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="on disk (default: bf16)")
    stored.add_argument(
        "--quantize", choices=["none", "int8", "fp8"], default="none", help="bases in 8 bits (default: none)"
    )
    parser.add_argument("--base-model", metavar="M", help="name or folder; adapters of another model are refused")
    parser.add_argument("--skip-bad", action="store_true", help="leave out adapters that cannot be read, and list them")
    parser.add_argument("--force", action="store_true", help="replace COLLECTION if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.base_model import of_one_base_model
    from vllm_jdlora.collection.build import compress

    _check(args)
    with progress_bars() as show:
        show("read adapters", 0, 1)
        adapters, skipped = read_adapters(args.adapters, skip_bad=args.skip_bad)
        if args.skip_bad:
            adapters, others, _ = of_one_base_model(adapters, args.base_model, skip_others=True)
            skipped = sorted([*skipped, *others])
        show("read adapters", 1, 1)
        rank, clusters = args.rank, args.clusters
        if args.preset:
            rank, clusters = _paper_size(adapters, args.seed, show)
        collection = compress(
            adapters,
            args.output,
            rank=rank,
            clusters=clusters,
            method=args.method,
            moments=_moments(args, adapters, show),
            max_error=args.max_error,
            max_bytes=None if args.max_bytes is None else args.max_bytes.of,
            dtype=args.dtype,
            quantize=args.quantize,
            seed=args.seed,
            effort=args.effort,
            base_model=args.base_model,
            force=args.force,
            skipped=skipped,
            progress=show,
        )
    print_report(collection, args.json)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse now, not after the work."""
    if args.max_error is not None and not 0 <= args.max_error <= 1:
        raise JDLoRAError(f"--max-error is a relative error between 0 and 1, not {args.max_error:g}")
    if args.effort < 0:
        raise JDLoRAError(f"--effort is 0 or more, not {args.effort:g}")
    if (args.rank or args.clusters) and (args.max_bytes or args.preset):
        raise JDLoRAError("--max-bytes and --preset choose rank and clusters: leave out --rank and --clusters")
    if args.preset and args.max_bytes:
        raise JDLoRAError("give --preset or --max-bytes, not both")
    if args.calibration is not None and args.metric == "frobenius":
        raise JDLoRAError("--calibration is for --metric activation or fisher")
    refuse_existing(args.output, args.force)


def _paper_size(adapters: list[Adapter], seed: int, show: Any) -> tuple[int, int]:
    from vllm_jdlora.collection.source import AdapterSource, common_slices
    from vllm_jdlora.jd.paper_preset import paper_preset
    from vllm_jdlora.jd.passes import Slices

    fitted = [a for a in adapters if not a.plain_only]
    slices = Slices(AdapterSource(fitted, common_slices(fitted)), None)
    choice = paper_preset(slices, len(fitted), seed=seed, progress=show)
    return choice.rank, choice.clusters


def _moments(args: argparse.Namespace, adapters: list[Adapter], show: Any) -> SecondMoments | None:
    """Second moments for the metric, gathered unless a file of them is given."""
    if args.metric == "frobenius":
        return None
    from vllm_jdlora.collection.source import common_slices

    slices = common_slices([a for a in adapters if not a.plain_only])
    return moments_from(args.calibration, args.base_model, slices, show, metric=args.metric)


def _clusters(text: str) -> int | None:
    return None if text == "auto" else positive(text)
