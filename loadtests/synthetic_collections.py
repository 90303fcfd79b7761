"""Collections and PEFT adapters of any number with random values, for measurements of speed only.

Throughput does not depend on what the weights are. Bases are random orthonormal columns, Σ and the adapters' B are so
small that answers stay those of the base model. Nothing was compressed, so the errors in these manifests are zero
by definition (an adapter *is* UΣV) and say nothing about compression. Σ are streamed to the disk: those of 100,000
adapters are gigabytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.adapter import WEIGHTS_FILE, SliceShape, file_digest
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.rewrite import Draft
from vllm_jdlora.collection.schema import MANIFEST_FILE, AdapterEntry, BaseModel, CollectionManifest, scalings_file
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.peft_config import CONFIG_FILE

ATTENTION = ("q_proj", "k_proj", "v_proj")
LINEAR = (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj")
_SCALE = 1e-4
_SHARD_BYTES, _PIECE_BYTES = 1 << 30, 1 << 26
_OFFSETS = 1 << 22


def model_slices(model: Path, targets: Sequence[str]) -> list[SliceShape]:
    """The slices of these linear modules in every layer of a Llama-shaped model, by its config.json."""
    config = json.loads((model / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention, keys, inner = heads * head, config.get("num_key_value_heads", heads) * head, config["intermediate_size"]
    shapes = {
        "q_proj": ("self_attn", attention, hidden),
        "k_proj": ("self_attn", keys, hidden),
        "v_proj": ("self_attn", keys, hidden),
        "o_proj": ("self_attn", hidden, attention),
        "gate_proj": ("mlp", inner, hidden),
        "up_proj": ("mlp", inner, hidden),
        "down_proj": ("mlp", hidden, inner),
    }
    return [
        SliceShape(f"model.layers.{layer}.{shapes[t][0]}.{t}", *shapes[t][1:])
        for layer in range(config["num_hidden_layers"])
        for t in targets
    ]


def write_collection(
    output: Path,
    model: Path,
    targets: Sequence[str],
    *,
    adapters: int,
    clusters: int,
    rank: int,
    seed: int = 0,
    quantize: str = "none",
) -> Collection:
    """A bf16 JD-Full collection of `adapters` in `clusters` (adapter i in a cluster drawn at random) of rank `rank`.

    quantize: ``int8`` or ``fp8`` for bases in 8 bits."""
    slices = model_slices(model, targets)
    random = torch.Generator().manual_seed(seed)
    # One orthonormal pair for each shape, its columns turned for each cluster and slice: QR of each would take minutes.
    shared = {
        size: torch.linalg.qr(torch.randn(size, rank, generator=random))[0]
        for size in sorted({s.d_out for s in slices} | {s.d_in for s in slices})
    }

    def basis(size: int) -> Tensor:
        """[K, size, R]: rows of the shared one, shifted, which keeps its columns orthonormal."""
        shifts = torch.randint(size, (clusters,), generator=random).tolist()
        return torch.stack([shared[size].roll(shift, 0) for shift in shifts]).bfloat16()

    bases = [(basis(part.d_out), basis(part.d_in).mT.contiguous()) for part in slices]
    members = torch.randint(clusters, (adapters,), generator=random).tolist()
    numbers = rank * sum(s.d_out + s.d_in for s in slices)
    entries = [
        AdapterEntry(
            name=f"synthetic-{i:05d}",
            cluster=cluster,
            relative_error=0.0,
            rank=rank,
            scale=1.0,
            parameters=numbers,
            sha256=hashlib.sha256(f"synthetic {seed} {i}".encode()).hexdigest(),
        )
        for i, cluster in enumerate(members)
    ]
    with written_atomically(output, MANIFEST_FILE) as folder:
        draft = Draft(folder, None, in_place=False)
        draft.bases(slices, bases, quantize)
        draft.files |= _write_scalings(folder, adapters, (len(slices), rank, rank), random)
        draft.errors(torch.zeros(adapters, len(slices)))
        draft.seal(
            CollectionManifest(
                base_model=BaseModel(model.name, file_digest(model / "config.json")),
                method="full",
                rank=rank,
                clusters=clusters,
                metric="frobenius",
                dtype="bf16",
                quantize=quantize,
                seed=seed,
                slices=tuple(slices),
                adapters=tuple(entries),
                plain=(),
                skipped=(),
                files=draft.files,
            )
        )
    return Collection.open(output, verify=False)


def _write_scalings(
    folder: Path, adapters: int, shape: tuple[int, int, int], random: torch.Generator
) -> dict[str, str]:
    """Shards of Σ [n, *shape]; file → SHA-256. Each adapter is a window of one random sequence, at a place of its own:
    numbers for each would take minutes."""
    if adapters > _OFFSETS:
        raise ValueError(f"at most {_OFFSETS} adapters differ")
    numbers = math.prod(shape)
    sequence = (_SCALE * torch.randn(_OFFSETS + numbers, generator=random)).bfloat16()
    windows = sequence.unfold(0, numbers, 1)
    places = torch.randperm(_OFFSETS, generator=random)[:adapters]
    row_bytes = numbers * sequence.element_size()
    shard, piece = (max(1, limit // row_bytes) for limit in (_SHARD_BYTES, _PIECE_BYTES))

    def rows(begin: int, end: int) -> Iterator[Tensor]:
        for at in range(begin, end, piece):
            yield torch.stack([windows[place] for place in places[at : min(end, at + piece)].tolist()])

    files = {}
    for number, begin in enumerate(range(0, adapters, shard)):
        end = min(adapters, begin + shard)
        name = scalings_file(number)
        layout = {"sigma": (sequence.dtype, (end - begin, *shape))}
        files[name] = write_streamed(folder / name, layout, rows(begin, end))
    return files


def write_adapters(
    output: Path, model: Path, targets: Sequence[str], *, adapters: int, rank: int, seed: int = 0
) -> list[Path]:
    """PEFT folders `output/synthetic-plain-NNNNN` in bf16."""
    slices = model_slices(model, targets)
    random = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    folders = []
    for i in range(adapters):
        folder = output / f"synthetic-plain-{i:05d}"
        folder.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        for part in slices:
            name = f"base_model.model.{part.name}"
            b = _SCALE * torch.randn(part.d_out, rank, generator=random)
            a = torch.randn(rank, part.d_in, generator=random) / part.d_in**0.5
            tensors |= {f"{name}.lora_A.weight": a.bfloat16(), f"{name}.lora_B.weight": b.bfloat16()}
        save_file(tensors, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1))
        folders.append(folder)
    return folders
