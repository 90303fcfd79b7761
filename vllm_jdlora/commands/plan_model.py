"""What adapters of a base model would change, from the model's config alone: no weights and no adapters are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_jdlora.errors import JDLoRAError

_EXPERTS = ("experts", "gate", "router")


def linear_layers(model: str) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear layer of the decoder, by the name that PEFT gives it.

    model: a folder with a config.json, that file, or a model's name, which transformers may have to download.

    Raises:
        JDLoRAError: transformers is not installed, or knows no such causal language model.
    """
    config = _config(model)
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(model, error) from error
    return {
        name: (module.out_features, module.in_features)
        for name, module in built.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def key_heads(model: str) -> int:
    """Heads of keys and values of the decoder's attention; model and raises: as of :func:`linear_layers`."""
    config = _config(model).get_text_config()
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _config(model: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise JDLoRAError("--base-model needs transformers: pip install 'vllm-jdlora[evaluate]'") from error
    folder = str(Path(model).parent) if Path(model).name == "config.json" else model
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown(model, error) from error


def _unknown(model: str, error: Exception) -> JDLoRAError:
    return JDLoRAError(f"{model}: no causal language model that transformers knows ({error})")


def targets_of(layers: Mapping[str, tuple[int, int]], suffixes: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The layers whose last name is among ``suffixes``.

    Raises:
        JDLoRAError: a suffix that no layer has, with those that there are.
    """
    there = {name.rpartition(".")[2] for name in layers}
    if absent := [suffix for suffix in suffixes if suffix not in there]:
        raise JDLoRAError(
            f"the base model has no linear layers named {', '.join(absent)}: it has {', '.join(sorted(there))}"
            + (", and experts cannot be compressed" if any(part in _EXPERTS for part in absent) else "")
        )
    return {name: shape for name, shape in layers.items() if name.rpartition(".")[2] in suffixes}
