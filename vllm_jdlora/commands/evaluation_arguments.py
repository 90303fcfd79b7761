"""What `jdlora evaluate` and `jdlora study` ask for alike, and how it is read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from vllm_jdlora.commands.terminal import positive
from vllm_jdlora.errors import JDLoRAError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, adapters, tasks, and how much of them."""
    parser.add_argument("--base-model", type=Path, required=True, metavar="M", help="Hugging Face folder")
    parser.add_argument("--adapters", nargs="+", type=Path, required=True, metavar="DIR", help="uncompressed")
    parser.add_argument("--tasks", type=Path, required=True, metavar="DIR", help="NAME.jsonl for each adapter NAME")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these adapters only")
    parser.add_argument("--limit", type=positive, metavar="N", help="first N test items of each task (default: all)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="of an answer (default: 64)")
    parser.add_argument(
        "--leakage-pairs", type=positive, metavar="N", help="at most N pairs of each kind (default: all of one cluster)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the model (default: fp32)")


def check_packages() -> None:
    """Raises JDLoRAError with what to install where the evaluation's packages are missing."""
    try:
        import rouge_score  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise JDLoRAError(f"evaluation needs more packages ({error}): pip install 'vllm-jdlora[evaluate]'") from None


def share(text: str) -> Fraction:
    """For argparse: a share of the uncompressed bytes."""
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 1/8") from None
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError("must be a share above 0 and up to 1, such as 1/8")
    return found


def baseline_names(asked: Sequence[str], option: str = "") -> list[str]:
    """Baselines in the order in which they are asked for, each once; "all" stands for all of them."""
    from vllm_jdlora.evaluation.baseline_variants import BASELINES

    unknown = sorted(set(asked) - {"all", *BASELINES})
    if unknown:
        raise JDLoRAError(f"{option}no baseline named {unknown[0]!r}: choose from {', '.join(BASELINES)}, or all")
    return list(BASELINES if "all" in asked else dict.fromkeys(asked))
