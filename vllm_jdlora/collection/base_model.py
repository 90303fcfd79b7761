"""Do all adapters belong to one base model, as far as their configs and the model's own config can tell?"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.json_file import parsed_object
from vllm_jdlora.peft_config import CONFIG_FILE

# Models whose projections follow from hidden_size, heads and intermediate_size; others are not checked by shape.
_LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite", "smollm3"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def of_one_base_model(
    adapters: Sequence[Adapter], asked: str | None = None, *, skip_others: bool = False
) -> tuple[list[Adapter], list[tuple[str, str]], BaseModel]:
    """The adapters of one base model, ``(name, reason)`` of each other one, and that model.

    Args:
        adapters: checked adapters.
        asked: name or folder of the base model. Names are compared by their last part. A folder that has a
            config.json is not compared by name (it may have been moved), but adapters must have its shapes.
            Without it, the model that most adapters name.
        skip_others: leave out adapters of another model instead of raising.

    Raises:
        JDLoRAError: an adapter belongs to another model (without ``skip_others``), or config.json is unreadable.
    """
    names = Counter(_short(a.base_model) for a in adapters if a.base_model)
    usual = next((a.base_model for a in adapters if names and _short(a.base_model) == names.most_common(1)[0][0]), None)
    config = Path(asked) / "config.json" if asked else None
    if asked and config is not None and config.is_file():
        content = config.read_bytes()
        shapes = _Shapes(_parsed(content, config))
        base = BaseModel(usual or Path(asked).name, hashlib.sha256(content).hexdigest())
        problems = [shapes.problem_of(adapter, config) for adapter in adapters]
    else:
        base = BaseModel(asked or usual)
        whose = "--base-model is" if asked else "most others are for"
        problems = [name_problem(adapter, base.name, whose) for adapter in adapters]
    others = [(a.name, problem) for a, problem in zip(adapters, problems, strict=True) if problem]
    if others and not skip_others:
        raise JDLoRAError(others[0][1])
    return [a for a, problem in zip(adapters, problems, strict=True) if not problem], others, base


def name_problem(adapter: Adapter, wanted: str | None, whose: str) -> str | None:
    """Why an adapter does not belong to the base model `wanted`, `whose` says who wants it; None if it may."""
    if adapter.base_model is None or _short(adapter.base_model) == _short(wanted):
        return None
    return (
        f"{adapter.path / CONFIG_FILE}: the adapter is for base model {adapter.base_model!r}, {whose} {wanted!r}: "
        "compress the adapters of each base model apart"
    )


def _short(name: str | None) -> str:
    return (name or "").rstrip("/").rsplit("/", 1)[-1].lower()


def _parsed(content: bytes, file: Path) -> dict[str, Any]:
    try:
        return parsed_object(content)
    except ValueError as error:
        raise JDLoRAError(f"{file}: not readable as JSON ({error})") from error


class _Shapes:
    """(d_out, d_in) of a Llama-like model's projections by their last name; empty where the model is another kind."""

    def __init__(self, config: Mapping[str, Any]):
        self.layers: int | None = None
        self.by_suffix: dict[str, tuple[int, int]] = {}
        if config.get("model_type") not in _LLAMA_LIKE:
            return
        sizes = [config.get(key) for key in ("hidden_size", "num_attention_heads", "intermediate_size")]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return
        hidden, heads, mlp = (int(size) for size in sizes if size)
        head = config.get("head_dim") or hidden // heads
        query, key_value = heads * head, (config.get("num_key_value_heads") or heads) * head
        self.layers = config.get("num_hidden_layers")
        self.by_suffix = {
            "q_proj": (query, hidden),
            "k_proj": (key_value, hidden),
            "v_proj": (key_value, hidden),
            "o_proj": (hidden, query),
            "gate_proj": (mlp, hidden),
            "up_proj": (mlp, hidden),
            "down_proj": (hidden, mlp),
        }

    def problem_of(self, adapter: Adapter, config: Path) -> str | None:
        for name, part in adapter.slices.items():
            shape = (part.shape.d_out, part.shape.d_in)
            expected = self.by_suffix.get(name.rpartition(".")[2], shape)
            if shape != expected:
                return (
                    f"{adapter.path / WEIGHTS_FILE}: {name} is {shape[0]} x {shape[1]}, with {config} it would be "
                    f"{expected[0]} x {expected[1]}: the adapter is for another base model"
                )
            layer = _LAYER.search(name)
            if layer and self.layers is not None and int(layer[1]) >= self.layers:
                return (
                    f"{adapter.path / WEIGHTS_FILE}: {name} is beyond the {self.layers} layers of {config}: "
                    "the adapter is for another base model"
                )
        return None
