"""Small random models of several architectures, and random LoRA adapters on the linear layers that each has."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
_HEAD = {"head_dim": 32}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _HEAD),
    "mistral": ("MistralConfig", {**_HEAD, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"hidden_size": 128}),  # biases on q, k, v
    "qwen3": ("Qwen3Config", _HEAD),  # norms on q and k
    "gemma3": (
        "Gemma3TextConfig",
        {**_HEAD, **_SLIDING, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    # q, k, v and gate, up are one matrix each in the checkpoint.
    "phi3": ("Phi3Config", {"hidden_size": 128, "original_max_position_embeddings": 256}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_HEAD, **_EXPERTS}),
}
"""Name → configuration class of transformers, and what differs from the sizes that all share."""


def write_model(folder: Path, architecture: str) -> Path:
    """A model whose logits are far enough apart that greedy tokens are certain; norms and biases are random too."""
    import transformers

    name, differences = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(_SIZES | differences))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.15)
        else:
            parameter.data += torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


def read_model(folder: str | Path) -> torch.nn.Module:
    """What :func:`write_model` wrote, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@cache
def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each linear layer inside the decoder layers, by the name that PEFT gives it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return {
        name: (module.out_features, module.in_features)
        for name, module in built.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def write_adapter(
    folder: Path,
    model: Path,
    seed: int,
    *,
    rank: int = 4,
    wanted: Callable[[str], bool] = lambda name: True,
    more: Collection[tuple[str, tuple[int, int]]] = (),
) -> Path:
    """A PEFT folder with random weights.

    model: a folder of :func:`write_model`. wanted: which of its linear layers. more: names and (d_out, d_in) of
    modules that transformers has no linear layer for, such as single experts.
    """
    shapes = {name: shape for name, shape in linear_shapes(model).items() if wanted(name)} | dict(more)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.1
        tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
