"""`jdlora distill`: the scaling matrices of a collection trained a little against the uncompressed adapters."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import positive, printable, progress_bars, refuse_existing
from vllm_jdlora.errors import JDLoRAError


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "distill", help="train the Σ of a collection a little, on the adapters' own data: same bytes, closer answers"
    )
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="NEW", help="folder to create")
    parser.add_argument("--base-model", type=Path, required=True, metavar="M", help="Hugging Face folder")
    parser.add_argument("--adapters", nargs="+", type=Path, required=True, metavar="DIR", help="uncompressed")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="NAME.jsonl for each adapter; the first 80 %% is used"
    )
    parser.add_argument("--moments", type=Path, metavar="FILE", help="of jdlora calibrate, to state output errors anew")
    parser.add_argument("--steps", type=positive, default=40, metavar="N", help="of each adapter (default: 40)")
    parser.add_argument("--lr", type=float, default=0.02, help="in units of Σ's root mean square (default: 0.02)")
    parser.add_argument(
        "--enough",
        type=float,
        default=0.03,
        metavar="D",
        help="leave adapters that diverge by no more nats an answer as they are (default: 0.03)",
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the model (default: bf16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace NEW if it exists")
    parser.add_argument("--json", action="store_true", help="the divergences as JSON on stdout")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    refuse_existing(args.output, args.force)
    try:
        from vllm_jdlora.collection.second_moments import SecondMoments
        from vllm_jdlora.evaluation.distil_collection import distil_collection
        from vllm_jdlora.evaluation.distillation import DistillationSettings
    except ImportError as error:
        raise JDLoRAError(f"distillation needs {error.name}: pip install 'vllm-jdlora[evaluate]'") from None
    settings = DistillationSettings(steps=args.steps, learning_rate=args.lr, enough=args.enough, seed=args.seed)
    with progress_bars() as show:
        results = distil_collection(
            args.collection,
            args.output,
            base_model=args.base_model,
            adapters=args.adapters,
            data=args.data,
            moments=None if args.moments is None else SecondMoments.load(args.moments),
            settings=settings,
            dtype=args.dtype,
            force=args.force,
            progress=show,
        )
    if args.json:
        print(json.dumps(results, indent=1))
        return 0
    for result in results:
        print(f"{printable(result['name'])}: {result['before']:.4f} → {result['after']:.4f}")
    before, refitted, after = (sum(r[key] for r in results) / len(results) for key in ("before", "refitted", "after"))
    print(
        f"{args.output}: mean divergence from the uncompressed adapters {before:.4f} → {after:.4f} nats a token "
        f"({refitted:.4f} by Σ refitted on own activations alone)"
    )
    print("held-out part of the data; Σ is kept as it was where it did not fall", file=sys.stderr)
    return 0
