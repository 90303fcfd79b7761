"""The flags that ``vllm serve`` gets, and what they do to the parsed namespace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.options import CONFIG_KEY, ServingOptions, absolute, adapter_paths

_DEPENDENT = ("lora_collection", "lora_dir", "jd_scaling_slots", "jd_max_error", "jd_base_bits")


def add_flags(parser: Any) -> Any:
    """Add the group ``JDLoRAConfig`` to a vLLM parser; ``vllm serve --help=JDLoRAConfig`` shows it."""
    if "--lora-compression" in parser._option_string_actions:
        return parser
    group = parser.add_argument_group(
        "JDLoRAConfig",
        "Serve LoRA adapters compressed by joint diagonalisation (vllm_jdlora). With --max-loras, vLLM's own flag, "
        "set how many uncompressed adapters one batch may hold beside the compressed ones.",
    )
    group.add_argument(
        "--lora-compression",
        choices=["jd"],
        default=None,
        help="Serve adapters compressed: shared bases stay on the device, each adapter is one small scaling matrix.",
    )
    group.add_argument(
        "--lora-collection",
        metavar="COLLECTION",
        default=None,
        help="Folder of a compressed collection (made by `jdlora compress`). Adapters given with --lora-modules or "
        "--lora-dir are then served uncompressed beside it. Without it, the collection is built from those "
        "adapters at start-up and cached by their content.",
    )
    group.add_argument(
        "--lora-dir",
        metavar="DIR",
        default=None,
        help="Every PEFT adapter folder inside DIR, named by its folder.",
    )
    group.add_argument(
        "--jd-scaling-slots",
        type=_positive,
        metavar="N",
        default=None,
        help="Scaling matrices resident on the device, which bounds the distinct compressed adapters in one batch. "
        "Default: all adapters of the collection, as far as they fit in 2 GiB.",
    )
    group.add_argument(
        "--jd-max-error",
        type=_fraction,
        metavar="E",
        default=None,
        help="Relative error (Frobenius, not squared) above which an adapter is not served compressed: it stays "
        "plain when the collection is built at start-up; a ready collection that breaks the limit is refused.",
    )
    group.add_argument(
        "--jd-base-bits",
        type=int,
        choices=[8, 16],
        default=None,
        help="Bits of a number of the shared bases in GPU memory. 8 keeps those of a collection made with --quantize "
        "int8 or fp8 as they are stored, beside uncompressed adapters in 16. Default: 16.",
    )
    return parser


def apply_flags(args: argparse.Namespace) -> None:
    """Turn the flags into ``additional_config`` and ``lora_modules`` of the namespace; idempotent.

    Raises:
        JDLoRAError: flags that do not go together, or adapters that cannot be served.
    """
    if getattr(args, "lora_compression", None) is None:
        if alone := [name for name in _DEPENDENT if getattr(args, name, None) is not None]:
            raise JDLoRAError(f"--{alone[0].replace('_', '-')} needs --lora-compression jd")
        return
    if CONFIG_KEY in (getattr(args, "additional_config", None) or {}):
        if getattr(args, "_jdlora_applied", False):
            return
        raise JDLoRAError(f"give --lora-compression jd or additional_config.{CONFIG_KEY}, not both")
    # Only now: these read tensors, and vLLM's parser is built in many processes.
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    from vllm_jdlora.collection import Collection

    given = _given_adapters(args)
    if args.lora_collection is not None:
        collection = Collection.open(absolute(args.lora_collection), verify=False)
        plain = given
    else:
        collection = _build(args, given)
        plain = []
    modules = adapter_paths(collection) + plain
    _refuse_twice([name for name, _ in modules])
    args.lora_modules = [LoRAModulePath(name, path) for name, path in modules]
    if args.lora_collection is not None and plain:
        args.lora_target_modules = sorted({*(args.lora_target_modules or ()), *_targets_of(plain)})
    options = ServingOptions(
        collection=str(collection.path),
        scaling_slots=args.jd_scaling_slots,
        max_error=args.jd_max_error,
        base_bits=args.jd_base_bits or 16,
    )
    args.additional_config = options.put_into(args.additional_config)
    args._jdlora_applied = True


def _given_adapters(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, folder) of every adapter given with vLLM's --lora-modules and with --lora-dir."""
    given = [(m.name, absolute(m.path)) for m in getattr(args, "lora_modules", None) or ()]
    if args.lora_dir is not None:
        root = Path(absolute(args.lora_dir))
        if not root.is_dir():
            raise JDLoRAError(f"--lora-dir {args.lora_dir}: no such folder")
        found = sorted(p.parent for p in root.glob("*/adapter_config.json"))
        if not found:
            raise JDLoRAError(f"--lora-dir {args.lora_dir}: no folder inside it has an adapter_config.json")
        given += [(folder.name, str(folder)) for folder in found]
    _refuse_twice([name for name, _ in given])
    return given


def _build(args: argparse.Namespace, given: list[tuple[str, str]]) -> Any:
    if not given:
        raise JDLoRAError(
            "--lora-compression jd needs adapters: give --lora-collection (made by `jdlora compress`), --lora-dir or "
            "--lora-modules"
        )
    from vllm_jdlora.serving.startup_build import build_cached

    return build_cached(given, base_model=getattr(args, "model_tag", None) or args.model, max_error=args.jd_max_error)


def _targets_of(plain: list[tuple[str, str]]) -> set[str]:
    from vllm_jdlora.adapter import read_adapter

    return {s.rpartition(".")[2] for name, path in plain for s in read_adapter(Path(path), name).slices}


def _refuse_twice(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise JDLoRAError(f"two adapters are named {name!r}: give each a name of its own")
        seen.add(name)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("is a relative error between 0 and 1")
    return value
