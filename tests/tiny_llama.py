"""A small random Llama with random LoRA adapters on all seven linear targets: fast engines for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 128, 4, 2, 32, 2, 256
TARGETS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
"""Target module → (d_out, d_in)."""


def write_model(folder: Path) -> Path:
    """A Llama whose logits are far enough apart that greedy tokens are certain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def write_adapter(folder: Path, seed: int, *, rank: int = 4, targets: list[str] | None = None) -> Path:
    """A PEFT folder with random weights on `targets` (suffixes such as q_proj; default all seven)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for target, (d_out, d_in) in TARGETS.items():
            if targets is not None and target.rpartition(".")[2] not in targets:
                continue
            name = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.1
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny-llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(
            {t.rpartition(".")[2] for t in TARGETS} & set(targets or [t.rpartition(".")[2] for t in TARGETS])
        ),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
