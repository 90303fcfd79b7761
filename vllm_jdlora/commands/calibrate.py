"""`jdlora calibrate`: the second moments of the base model's activations and gradients, for the metrics of a fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import positive, progress_bars, readable_bytes


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate", help="gather the second moments that --metric activation and fisher weigh by"
    )
    parser.add_argument("--base-model", type=Path, required=True, metavar="M", help="Hugging Face folder")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='.txt, or .jsonl of {"text"} or {"instruction", "input", "output"} (default: 221 short tasks of our own)',
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--adapters", nargs="+", type=Path, metavar="ADAPTER", help="gather for these adapters' modules")
    which.add_argument(
        "--targets",
        nargs="+",
        default=["q_proj", "k_proj", "v_proj"],
        help="or by name (default: q_proj k_proj v_proj)",
    )
    parser.add_argument("--gradients", action="store_true", help="those of gradients too, for --metric fisher")
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help="of each text (default: 512)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the model (default: fp32)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.calibration import calibration_texts, gather_cached, slices_of

    if args.adapters:
        adapters, _ = read_adapters(args.adapters)
        slices = list({name: part.shape for a in adapters for name, part in a.slices.items()}.values())
    else:
        slices = slices_of(args.base_model, args.targets)
    texts = calibration_texts(args.base_model, args.calibration)
    with progress_bars() as show:
        moments = gather_cached(
            args.base_model,
            texts,
            slices,
            gradients=args.gradients,
            max_tokens_per_text=args.max_tokens,
            dtype=args.dtype,
            progress=show,
        )
    moments.save(args.output)
    origin = moments.origin
    print(
        f"{args.output}: {len(moments.matrices)} second moments for {len(moments.inputs)} modules, from "
        f"{origin.tokens} tokens of {origin.texts} texts (sha256 {origin.text_sha256[:12]}…), "
        f"{readable_bytes(args.output.stat().st_size)}"
    )
    return 0
