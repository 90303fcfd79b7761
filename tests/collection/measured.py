"""Errors of what a collection stores, from dense fp64 products and second moments: the reference of edits in a metric.

It reads files and shares no code with the package but the container of the moments.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import reference
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.second_moments import Origin, SecondMoments

RIDGE = 1e-3
"""Of the metric: share of the mean energy added to each direction."""


def moments_that_shun(adapter: Path, *, text: str = "0", gradients: bool = False) -> SecondMoments:
    """C of each slice: hardly any input along the rows of this adapter's A, and more along some axes than others.

    gradients: G too, of some outputs' axes more than of others.
    """
    matrices = {}
    outputs = {}
    for name, delta in reference.plain_deltas(adapter).items():
        right = torch.linalg.svd(delta.double()).Vh[:4]
        plain = torch.diag(torch.logspace(-1, 0.2, delta.shape[1], dtype=torch.float64))
        keep = torch.eye(delta.shape[1], dtype=torch.float64) - 0.9 * right.T @ right
        matrices[name] = (keep @ plain @ keep).float()
        if gradients:
            outputs[name] = f"{name}:gradients"
            matrices[outputs[name]] = torch.diag(torch.logspace(0.2, -1, delta.shape[0]))
    origin = Origin(BaseModel("tiny"), text * 64, texts=1, tokens=9, max_tokens=9, dtype="fp32")
    inputs = {name: name for name in matrices if ":" not in name}
    return SecondMoments(origin, inputs, matrices, outputs)


def metric(moments: SecondMoments | None, name: str, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """G [d_out, d_out] and C [d_in, d_in] fp64 as the package scales and lifts them; identities without moments."""
    found = (None, None) if moments is None else (moments.gradients_of(name), moments.of(name))
    scaled = []
    for size, moment in zip(delta.shape, found, strict=True):
        eye = torch.eye(size, dtype=torch.float64)
        scaled.append(eye if moment is None else moment.double() / moment.double().diagonal().mean() + RIDGE * eye)
    return scaled[0], scaled[1]


def stored_error(collection: Path, name: str, original: Path, moments: SecondMoments | None = None) -> float:
    """√(Σ tr(Dᵀ G D C) / Σ tr(ΔWᵀ G ΔW C)) over all slices, D = ΔW − UΣV."""
    served, deltas = reference.compressed_deltas(collection, name), reference.plain_deltas(original)
    lost = energy = 0.0
    for part, delta in deltas.items():
        g, c = metric(moments, part, delta)
        d = (delta - served[part]).double()
        lost += float((g @ d @ c * d).sum())
        energy += float((g @ delta.double() @ c * delta.double()).sum())
    return (lost / energy) ** 0.5


def energy(original: Path, moments: SecondMoments) -> float:
    """Σ_slices ‖ΔW‖² in the metric of the moments, dense."""
    total = 0.0
    for part, delta in reference.plain_deltas(original).items():
        g, c = metric(moments, part, delta)
        total += float((g @ delta.double() @ c * delta.double()).sum())
    return total


def best_errors(collection: Path, original: Path, moments: SecondMoments | None = None) -> list[float]:
    """For each cluster, the error that the best Σ on its bases as stored leaves (JD-Full or JD-Diag), dense."""
    manifest = json.loads((collection / "collection.json").read_text())
    bases = load_file(collection / "bases.safetensors")
    errors = []
    for k in range(manifest["clusters"]):
        lost = energy = 0.0
        for part, delta in reference.plain_deltas(original).items():
            u, v = (bases[f"{part}.{side}"][k].double() for side in "UV")
            root_out, root = (torch.linalg.cholesky(m) for m in metric(moments, part, delta))
            wanted, u, right = root_out.T @ delta.double() @ root, root_out.T @ u, v @ root
            if manifest["method"] == "diag":
                terms = torch.stack([torch.outer(u[:, j], right[j]).flatten() for j in range(u.shape[1])], 1)
                found = (terms @ torch.linalg.lstsq(terms, wanted.flatten()).solution).view_as(wanted)
            else:
                found = u @ torch.linalg.pinv(u) @ wanted @ torch.linalg.pinv(right) @ right
            lost += float((wanted - found).square().sum())
            energy += float(wanted.square().sum())
        errors.append((lost / energy) ** 0.5)
    return errors


def write_sum(folder: Path, first: Path, second: Path, share: float) -> Path:
    """An adapter ΔW = ΔW_first + share · ΔW_second, of both ranks together."""
    a, b = (load_file(source / "adapter_model.safetensors") for source in (first, second))
    tensors = {}
    for key in a:
        other = b[key] * share if "lora_B" in key else b[key]
        tensors[key] = torch.cat([a[key], other], 1 if "lora_B" in key else 0).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((first / "adapter_config.json").read_text())
    config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def write_turned(folder: Path, collection: Path, like: Path, share: float) -> Path:
    """ΔW = U_0 P V_0 + share · U_1 V_1 in every slice, P a cyclic shift, both parts of unit norm before the share.

    Cluster 0's spans hold the larger part, its diagonal scalings hardly anything of it.
    """
    bases = load_file(collection / "bases.safetensors")
    names = sorted({key.rpartition(".")[0] for key in bases})
    tensors = {}
    for name in names:
        (u, other_u), (v, other_v) = (bases[f"{name}.{side}"] for side in "UV")
        parts = [(u.roll(1, 1), v), (other_u, other_v)]
        sizes = [float((left @ right).norm()) for left, right in parts]
        left = torch.cat([parts[0][0] / sizes[0], share * parts[1][0] / sizes[1]], 1)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_B.weight"] = left.contiguous()
        tensors[f"{key}.lora_A.weight"] = torch.cat([parts[0][1], parts[1][1]]).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key)
    config = json.loads((like / "adapter_config.json").read_text()) | {"r": rank, "lora_alpha": rank}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
