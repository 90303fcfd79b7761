"""`jdlora train`: one LoRA adapter on one task file, for the evaluation only."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.commands.terminal import positive


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train one LoRA on a task file (for the evaluation only)",
        description="Train one PEFT LoRA on the first 80 % of a task file; the next 10 % choose the checkpoint. Made "
        "to give the evaluation adapters of any length of training: no trainer for production. Killed, it goes on.",
    )
    parser.add_argument("task", type=Path, metavar="TASK", help='.jsonl of {"instruction", "input", "output"}')
    parser.add_argument("--base-model", type=Path, required=True, metavar="M", help="Hugging Face folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="PEFT folder to create")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N")
    length.add_argument("--epochs", type=float, default=1.0, metavar="E", help="default: 1")
    parser.add_argument("--lr", type=float, default=2e-3, help="default: 2e-3, cosine to 0")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="default: 16")
    parser.add_argument("--rank", type=positive, default=16, metavar="R", help="default: 16")
    parser.add_argument("--alpha", type=positive, metavar="A", help="default: 2 R")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "k_proj", "v_proj"], help="default: q, k and v")
    parser.add_argument("--max-tokens", type=positive, default=192, metavar="N", help="longer items are left out (192)")
    parser.add_argument("--checkpoints", type=positive, default=3, metavar="N", help="to choose from (default: 3)")
    parser.add_argument("--keep", choices=["best", "last"], default="best", help="by validation loss (default: best)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the base model (default: fp32)")
    parser.add_argument("--seed", type=int, default=0, help="of LoRA's start and of the order (default: 0)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from vllm_jdlora.evaluation.train import TrainSettings, train

    settings = TrainSettings(
        rank=args.rank,
        alpha=args.alpha or 2 * args.rank,
        targets=tuple(sorted(args.targets)),
        steps=args.steps,
        epochs=args.epochs,
        learning_rate=args.lr,
        batch=args.batch,
        max_tokens=args.max_tokens,
        checkpoints=args.checkpoints,
        keep=args.keep,
        dtype=args.dtype,
        seed=args.seed,
    )
    metrics = train(args.base_model, args.task, args.output, settings)
    print(
        f"{args.output}: {metrics['steps']} steps ({metrics['epochs']:.1f} epochs), step {metrics['kept_step']} kept; "
        f"test loss {metrics['base_test_loss']:.3f} → {metrics['lora_test_loss']:.3f}, token accuracy "
        f"{metrics['base_token_acc']:.2f} → {metrics['lora_token_acc']:.2f}"
    )
    return 0
