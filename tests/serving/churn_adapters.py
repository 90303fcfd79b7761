"""Adapters of known content for a server under churn: on bases that a collection has, or on none; and what they add.

Σ are bf16 numbers, and folders are made of U Σ and V, so projecting a folder on its bases gives the very Σ back. Hence
an adapter's ΔW is known exactly, wherever the server puts it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.rewrite import write_new
from vllm_jdlora.collection.schema import MANIFEST_FILE, AdapterEntry, BaseModel

RANK, CLUSTERS = 16, 4
_STRENGTH = 1.0
"""Of Σ's numbers: an adapter then changes a projection's output by about a third."""


@dataclass(frozen=True)
class Content:
    """What an adapter is.

    Attributes:
        bases: seed of the bases that hold it; None for directions of its own.
        seed: of all else.
    """

    bases: int | None
    seed: int

    @property
    def cluster(self) -> int:
        return self.seed % CLUSTERS


def slices(model: Path) -> tuple[SliceShape, ...]:
    """q, k and v of every layer."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    return tuple(
        SliceShape(f"model.layers.{layer}.self_attn.{target}", size, hidden)
        for layer in range(config["num_hidden_layers"])
        for target, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
    )


@lru_cache(maxsize=4)
def bases(model: Path, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(U [K, d_out, R], V [K, R, d_in]) bf16 of each slice."""
    random = torch.Generator().manual_seed(seed)

    def columns(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(CLUSTERS, size, RANK, generator=random)).Q.bfloat16()

    return [(columns(part.d_out), columns(part.d_in).mT.contiguous()) for part in slices(model)]


def sigma(model: Path, content: Content) -> torch.Tensor:
    """[slices, R, R] bf16."""
    random = torch.Generator().manual_seed(1_000_000 + content.seed)
    return (_STRENGTH * torch.randn(len(slices(model)), RANK, RANK, generator=random)).bfloat16()


def factors(model: Path, content: Content) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(B [d_out, R], A [R, d_in]) fp32 of each slice."""
    own = Content(content.seed, content.seed) if content.bases is None else content
    k = own.cluster
    pairs = zip(bases(model, own.bases), sigma(model, own), strict=True)
    return [(u[k].float() @ s.float(), v[k].float()) for (u, v), s in pairs]


def deltas(model: Path, content: Content | None) -> dict[str, torch.Tensor]:
    """ΔW [d_out, d_in] by module path; nothing for the base model."""
    if content is None:
        return {}
    return {part.name: b @ a for part, (b, a) in zip(slices(model), factors(model, content), strict=True)}


def write_folder(folder: Path, model: Path, content: Content) -> Path:
    """The PEFT folder of a content."""
    tensors = {}
    for part, (b, a) in zip(slices(model), factors(model, content), strict=True):
        tensors[f"base_model.model.{part.name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{part.name}.lora_B.weight"] = b.contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_collection(folder: Path, model: Path, contents: Mapping[str, Content]) -> Path:
    """A collection of these contents, all on bases of one seed."""
    (seed,) = {content.bases for content in contents.values()}
    parts = slices(model)
    entries = [
        AdapterEntry(name, content.cluster, 0.0, RANK, 1.0, 1, hashlib.sha256(str(content).encode()).hexdigest())
        for name, content in contents.items()
    ]
    with written_atomically(folder, MANIFEST_FILE) as draft:
        write_new(
            draft,
            base_model=BaseModel(None),
            dtype="bf16",
            slices=parts,
            bases=bases(model, seed),
            sigma=torch.stack([sigma(model, content) for content in contents.values()]),
            slice_errors=torch.zeros(len(entries), len(parts)),
            adapters=entries,
        )
    return folder
