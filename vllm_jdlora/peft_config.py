"""``adapter_config.json``: what it says about A and B, and what in it nobody here or in vLLM can serve.

The rules are those of vLLM 0.32 (``vllm/lora/peft_helper.py``); the patterns follow PEFT's ``get_pattern_key``.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import parsed_object, read_text, short

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 16 << 20
_MAX_RANK = 1 << 16
MAX_MODULE_NAME = 256
"""Characters of a module's path; the longest of a known model has about 70."""
# Inits that leave the base model's weights alone, so that the saved A and B are the whole adapter.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HEADS = ("classifier", "score")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA bias (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "use_qalora": "QALoRA",
}


@dataclass(frozen=True)
class PeftConfig:
    """The part of ``adapter_config.json`` that says what A and B mean."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    heads: tuple[str, ...]
    base_model: str | None

    @classmethod
    def read(cls, file: Path) -> "PeftConfig":
        """Read and check one config; JDLoRAError names what is wrong in it."""
        try:
            raw = parsed_object(read_text(file, _MAX_BYTES))
        except FileNotFoundError:
            raise JDLoRAError(f"{file.parent}: no {CONFIG_FILE}; this is not a PEFT adapter folder") from None
        except ValueError as error:
            raise JDLoRAError(f"{file}: not readable as JSON ({error})") from error
        missing = [field for field in ("r", "lora_alpha", "target_modules") if field not in raw]
        if missing:
            raise JDLoRAError(f"{file}: lacks {', '.join(missing)}; this is not a LoRA's config")
        _refuse_unsupported(raw, file)
        if not _is_rank(raw["r"]):
            raise JDLoRAError(f"{file}: r must be a positive integer up to {_MAX_RANK}, is {short(raw['r'])}")
        if not _is_number(raw["lora_alpha"]):
            raise JDLoRAError(f"{file}: lora_alpha must be a number up to 1e9, is {short(raw['lora_alpha'])}")
        base_model = raw.get("base_model_name_or_path")
        if base_model is not None and not isinstance(base_model, str):
            raise JDLoRAError(f"{file}: base_model_name_or_path must be text, is {short(base_model)}")
        return cls(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            rslora=bool(raw.get("use_rslora")),
            rank_pattern=_pattern(raw, "rank_pattern", _is_rank, f"a positive integer up to {_MAX_RANK}", file),
            alpha_pattern=_pattern(raw, "alpha_pattern", _is_number, "a number up to 1e9", file),
            heads=tuple(raw.get("modules_to_save") or ()),
            base_model=base_model or None,
        )

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """ρ and s of one module: the first pattern that matches a suffix at a dot wins (PEFT's rule)."""
        rank = _first_match(self.rank_pattern, module, self.rank)
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rslora else rank)


def _refuse_unsupported(raw: dict[str, Any], file: Path) -> None:
    for field, feature in _UNSUPPORTED.items():
        if raw.get(field):
            raise JDLoRAError(f"{file}: {feature} is not supported, as in vLLM")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise JDLoRAError(
            f"{file}: init_lora_weights={short(init)} changes the base model's weights; save the adapter "
            "as a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )
    if raw.get("bias", "none") != "none":
        raise JDLoRAError(f"{file}: bias={short(raw['bias'])} is not supported; retrain with bias='none'")
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or any(module not in HEADS for module in saved):
        raise JDLoRAError(f"{file}: modules_to_save={short(saved)}; only {' and '.join(HEADS)} can be served")


def _pattern(
    raw: dict[str, Any], field: str, valid: Callable[[object], bool], meaning: str, file: Path
) -> dict[re.Pattern[str], Any]:
    pattern = raw.get(field) or {}
    if not isinstance(pattern, dict):
        raise JDLoRAError(f"{file}: {field} must be an object")
    compiled = {}
    for key, value in pattern.items():
        if not valid(value):
            raise JDLoRAError(f"{file}: {field}[{key[:80]!a}] must be {meaning}, is {short(value)}")
        if not _is_tame(key):
            raise JDLoRAError(
                f"{file}: {field}: {key[:80]!a} is a regular expression that may take for ever: name the modules "
                "themselves"
            )
        try:
            compiled[re.compile(rf"(.*\.)?({key})$")] = value
        except (re.error, RecursionError, OverflowError) as error:
            raise JDLoRAError(f"{file}: {field}: {key[:80]!a} is not a regular expression ({error})") from error
    return compiled


_ONE_CHARACTER = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


_MOST_STEPS = 10**9


def _is_tame(key: str) -> bool:
    """Whether matching it with a module's name takes a bounded number of steps, as far as its form tells.

    A regular expression from outside can keep a process busy for ever, and the interpreter with it.
    """
    if re.search(r"\\[1-9]|\(\?(?!:)", key):  # back-references, and groups that look around or set flags
        return False
    bare = _ONE_CHARACTER.sub("x", key).replace("(?:", "(")
    if re.search(r"\)[*+?{]", bare):
        return False
    repeats, groups, choices = sum(map(bare.count, "*+?{")), bare.count("("), bare.count("|") + 1
    if repeats + groups > 9:
        return False
    return int(MAX_MODULE_NAME ** (repeats + 1) * choices ** max(groups, 1)) <= _MOST_STEPS


def _first_match(pattern: Mapping[re.Pattern[str], Any], module: str, default: float) -> float:
    return next((value for key, value in pattern.items() if key.match(module)), default)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_RANK


def _is_number(value: object) -> bool:
    # The bound keeps s·B inside fp32 and turns away integers too long for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9
