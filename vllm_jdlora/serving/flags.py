"""The flags that ``vllm serve`` gets, and what they do to the parsed namespace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.options import AGE_CAP, CONFIG_KEY, ServingOptions, absolute

MIDDLEWARE = "vllm_jdlora.serving.http_routes.AdapterRoutes"
"""For vLLM's ``--middleware``; by name, because what it imports is heavy."""

_DEPENDENT = (
    "lora_collection",
    "lora_dir",
    "jd_scaling_slots",
    "jd_base_slots",
    "jd_max_error",
    "jd_base_bits",
    "jd_age_cap",
    "jd_cluster_order",
    "jd_adapter_dir",
)


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
        "--jd-base-slots",
        type=_positive,
        metavar="N",
        default=None,
        help="Clusters whose shared bases are resident on the device, which bounds the distinct clusters in one batch. "
        "With as many as the collection and its successor have together, a reload to other bases makes nobody wait. "
        "Default: all clusters of the collection.",
    )
    group.add_argument(
        "--jd-max-error",
        type=_fraction,
        metavar="E",
        default=None,
        help="Relative error (Frobenius, not squared) above which an adapter is not served compressed: it stays "
        "plain when the collection is built at start-up or when it is loaded at run time; a ready collection that "
        "breaks the limit is refused.",
    )
    group.add_argument(
        "--jd-base-bits",
        type=int,
        choices=[8, 16],
        default=None,
        help="Bits of a number of the shared bases on the device. 8 keeps those of a collection made with --quantize "
        "int8 or fp8 as they are stored, beside uncompressed adapters in 16. Default: 8 for such a collection "
        "on CPU, else 16.",
    )
    group.add_argument(
        "--jd-age-cap",
        type=_seconds,
        metavar="SECONDS",
        default=None,
        help="Where there are fewer slots than requests ask for: one that has waited longer gets the next slot that "
        "comes free, and one is drained for it by holding back younger requests of its adapter or cluster. inf: never. "
        f"Default: {AGE_CAP:g}.",
    )
    group.add_argument(
        "--jd-cluster-order",
        choices=["auto", "off"],
        default=None,
        help="auto: where more clusters are asked for than --jd-base-slots holds, requests go first whose cluster's "
        "bases are on the device, then those of the cluster that is waited for most; --jd-age-cap keeps the others "
        "from being passed for ever. off: by arrival, however often bases are swapped. Default: auto.",
    )
    group.add_argument(
        "--jd-adapter-dir",
        metavar="DIR",
        default=None,
        help="A request for a model that is not known is answered with the PEFT adapter folder of that name inside "
        "DIR, compressed on the spot. Needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, with which adapters also come and go "
        "by /v1/load_lora_adapter, /v1/unload_lora_adapter and /v1/reload_lora_collection. Default: "
        "VLLM_LORA_RESOLVER_CACHE_DIR.",
    )
    return parser


def apply_flags(args: argparse.Namespace) -> None:
    """Turn the flags into ``additional_config``, ``lora_modules`` and ``middleware`` of the namespace; idempotent.

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

    from vllm_jdlora.serving.starting_collection import open_once

    arrivals = _runtime_updates(args)
    given = _given_adapters(args)
    if args.lora_collection is not None:
        collection = open_once(absolute(args.lora_collection))
        plain = given
    else:
        collection = _build(args, given)
        plain = []
    manifest = collection.manifest
    _refuse_twice(
        [*(a.name for a in manifest.adapters), *(p.name for p in manifest.plain), *(name for name, _ in plain)]
    )
    # The API server enters the collection's adapters itself: vLLM would make a call to the engine for each of these.
    args.lora_modules = [LoRAModulePath(name, path) for name, path in plain] or None
    args.middleware = [*(getattr(args, "middleware", None) or ()), MIDDLEWARE]
    if args.lora_collection is not None and plain:
        args.lora_target_modules = sorted({*(args.lora_target_modules or ()), *_targets_of(plain)})
    options = ServingOptions(
        collection=str(collection.path),
        scaling_slots=args.jd_scaling_slots,
        max_error=args.jd_max_error,
        base_bits=args.jd_base_bits,
        base_slots=args.jd_base_slots,
        arrivals=arrivals,
        age_cap=AGE_CAP if args.jd_age_cap is None else args.jd_age_cap,
        cluster_order=args.jd_cluster_order != "off",
    )
    args.additional_config = options.put_into(args.additional_config)
    args._jdlora_applied = True


def _runtime_updates(args: argparse.Namespace) -> str:
    """The folder for adapters that come while the server runs; empty where vLLM is not to take any."""
    import vllm.envs as envs

    from vllm_jdlora.serving.arrivals_folder import claim_arrivals_folder

    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        if args.jd_adapter_dir is not None:
            raise JDLoRAError("--jd-adapter-dir needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in the environment")
        return ""
    args.jd_adapter_dir = args.jd_adapter_dir or envs.VLLM_LORA_RESOLVER_CACHE_DIR
    if args.jd_adapter_dir is not None:
        args.jd_adapter_dir = absolute(args.jd_adapter_dir)
        if not Path(args.jd_adapter_dir).is_dir():
            raise JDLoRAError(f"--jd-adapter-dir {args.jd_adapter_dir}: no such folder")
    return str(claim_arrivals_folder())


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
    from vllm_jdlora.serving.engine_settings import targets_of_plain

    return {target for name, path in plain for target in targets_of_plain(read_adapter(Path(path), name))}


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


def _seconds(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError("is a number of seconds from 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("is a relative error between 0 and 1")
    return value
