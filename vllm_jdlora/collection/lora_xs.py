"""LoRA-XS adapters (arXiv 2405.17604) as a collection without loss: one cluster, U = B, V = A, Σ = s·M.

LoRA-XS fixes A and B from the SVD of the base weights and trains only an [r, r] matrix M between them:
ΔW = s·B·M·A. That is JD-Full of one cluster, already diagonalised. The checkpoints are those of the authors'
repository (MohammadrezaBanaei/LoRA-XS): PEFT folders whose weights also have a ``…lora_latent_mapping.weight`` for
each module, under either of the two names that PEFT versions make of ``MODULE.default_lora_latent_mapping``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_jdlora.adapter import (
    WEIGHTS_FILE,
    Adapter,
    AdapterSlice,
    SliceShape,
    check_adapter_name,
    content_digest,
    folder_name,
)
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.base_model import of_one_base_model
from vllm_jdlora.collection.base_weights import BaseWeights
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.rewrite import adapter_entry, common_slices, write_new
from vllm_jdlora.collection.schema import MANIFEST_FILE
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import Factors, SliceProblem, squared_error, squared_norm
from vllm_jdlora.jd.projection import refit_sigma
from vllm_jdlora.peft_config import CONFIG_FILE, HEADS, PeftConfig
from vllm_jdlora.tensor_file import identity_of

Progress = Callable[[str, int, int], None]
# A and B of adapters of one base model and rank are equal; computed on different machines they differ by rounding.
_SAME = 1e-5
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
# PEFT before 0.14 cut every ".default" out of the name, later ones only the last part.
_LATENT = (
    re.compile(r"(?P<module>.+)\.[^.]+_lora_latent_mapping\.weight"),
    re.compile(r"(?P<module>.+)_lora_latent_mapping\.weight"),
)
_FLOATING = {"F16", "BF16", "F32"}


@dataclass(frozen=True, eq=False)
class LoraXS:
    """One checked LoRA-XS folder. ``adapter`` holds name, base model, digest and slices; its factors are not ΔW."""

    adapter: Adapter
    latent: Mapping[str, str]  # slice -> key of M [r, r]
    fixed: Mapping[str, tuple[str, str]]  # slice -> keys of (A [r, d_in], B [d_out, r]); empty where not saved

    def tensor(self, key: str) -> Tensor:
        """fp32."""
        with _opened(self.adapter.path / WEIGHTS_FILE) as weights:
            return weights.get_tensor(key).float()


def read_lora_xs(path: Path, base: BaseWeights | None = None) -> LoraXS:
    """Read and check one folder; `base` gives the shapes where A and B are not in it.

    Raises:
        JDLoRAError: the first thing found wrong, with the file and tensor it is in.
    """
    path = Path(path)
    name = folder_name(path)
    check_adapter_name(name)
    config = PeftConfig.read(path / CONFIG_FILE)
    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise JDLoRAError(f"{path}: no {WEIGHTS_FILE} (pickles are not read)")
    with _opened(file) as weights:
        keys = sorted(weights.keys())
        shapes = {key: _checked(weights, key, file) for key in keys}
    sides: dict[str, dict[str, str]] = {}
    for key in keys:
        if found := _LORA.fullmatch(_path(key)):
            sides.setdefault(found["module"], {})[found["side"]] = key
    latent: dict[str, str] = {}
    for key in keys:
        module = _module_of(_path(key), sides, base)
        if module is not None:
            latent[module] = key
        elif not _LORA.fullmatch(_path(key)):
            head = any(part in HEADS for part in key.split("."))
            reason = "a trained head cannot be compressed" if head else "not a weight of LoRA-XS"
            raise JDLoRAError(f"{file}: {key[:200]!a}: {reason}")
    if not latent:
        raise JDLoRAError(f"{file}: no lora_latent_mapping in it; compress ordinary LoRAs with jdlora compress")
    if lost := sorted(set(sides) - set(latent)):
        raise JDLoRAError(f"{file}: {lost[0]}: A and B without lora_latent_mapping")
    slices = {}
    for module, key in latent.items():
        pair = sides.get(module, {})
        if len(pair) == 1:
            raise JDLoRAError(f"{file}: {module}: only lora_{next(iter(pair))} is there, both or none are needed")
        rank, scale = config.rank_and_scale(module)
        if pair:
            (rank_a, d_in), (d_out, rank_b) = shapes[pair["A"]], shapes[pair["B"]]
        elif base is not None:
            (d_out, d_in), rank_a, rank_b = base.shape(module), rank, rank
        else:
            raise JDLoRAError(
                f"{file}: {module}: A and B are not in the file; give --base-model FOLDER to compute them from its "
                "weights"
            )
        if shapes[key] != (rank, rank) or (rank_a, rank_b) != (rank, rank) or rank > min(d_out, d_in):
            raise JDLoRAError(
                f"{file}: {module}: M is {shapes[key]}, A [{rank_a}, {d_in}], B [{d_out}, {rank_b}]; {CONFIG_FILE} "
                f"says rank {rank}"
            )
        slices[module] = AdapterSlice(SliceShape(module, d_out, d_in), rank, scale)
    return LoraXS(
        adapter=Adapter(
            name=name,
            path=path,
            base_model=config.base_model,
            rank=max(part.rank for part in slices.values()),
            sha256=content_digest(path),
            # What was trained and what each further adapter costs: A and B belong to the base model.
            parameters=sum(part.rank**2 for part in slices.values()),
            slices=slices,
            keys={},
            places={},
            weights=identity_of(file),
        ),
        latent=latent,
        fixed={module: (pair["A"], pair["B"]) for module, pair in sides.items()},
    )


def import_lora_xs(
    paths: Sequence[Path],
    output: Path,
    *,
    dtype: str = "fp32",
    base_model: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Collection:
    """Write LoRA-XS folders of one base model as a collection of one cluster.

    With ``dtype`` fp32 nothing is lost; with bf16 or fp16 the cast is, and Σ is refitted on the cast bases (the
    recorded errors are those of the stored values). The bases are A and B as they are: rows of A carry singular
    values, they are not of unit norm. Where A and B were not saved they are computed from the base weights of the
    folder `base_model` by the authors' call, ``torch.linalg.svd(Wᵀ)``; see ``BaseWeights.lora_xs_factors`` for what
    that cannot know.

    Raises:
        JDLoRAError: no folders, a bad one, different A or B, or ``output`` cannot be written.
    """
    if dtype not in TORCH_DTYPES:
        raise JDLoRAError(f"dtype {dtype!r} is not one of {', '.join(TORCH_DTYPES)}")
    base = BaseWeights.open(base_model) if base_model is not None else None
    adapters = sorted((read_lora_xs(path, base) for path in _folders(paths)), key=lambda a: a.adapter.name)
    plain = [a.adapter for a in adapters]
    if len({a.name for a in plain}) != len(plain):
        raise JDLoRAError("two of the adapters have one name; rename a folder")
    _, _, model = of_one_base_model(plain, base_model)
    slices = common_slices(plain)
    rank = max(a.rank for a in plain)
    n, stored = len(adapters), TORCH_DTYPES[dtype]
    sigma = torch.zeros(n, len(slices), rank, rank, dtype=stored)
    norms, errors = (torch.zeros(n, len(slices), dtype=torch.float64) for _ in range(2))
    bases = []
    for m, part in enumerate(slices):
        if progress:
            progress("import", m, len(slices))
        shared: tuple[Tensor, Tensor] | None = None
        for i, one in enumerate(adapters):
            if part.name not in one.latent:
                continue
            own = one.adapter.slices[part.name]
            b, a = _fixed_factors(one, part.name, base)
            shared = shared or (b, a)
            _check_same(one, part.name, (b, a), shared)
            latent = one.tensor(one.latent[part.name]).double() * own.scale
            u, v = shared[0].to(stored), shared[1].to(stored)
            sigma[i, m, : own.rank, : own.rank], norms[i, m], errors[i, m] = _stored(latent, b, a, u, v)
        assert shared is not None
        u, v = shared[0].to(stored), shared[1].to(stored)
        bases.append((_padded(u, 1, rank)[None], _padded(v, 0, rank)[None]))
    if progress:
        progress("import", len(slices), len(slices))
    if not bool(sigma.isfinite().all()):
        raise JDLoRAError(f"the trained matrices do not fit into {dtype}: give --dtype fp32")
    whole = (errors.sum(1) / norms.sum(1).clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    with written_atomically(output, MANIFEST_FILE, force=force) as folder:
        write_new(
            folder,
            base_model=model,
            dtype=dtype,
            slices=slices,
            bases=bases,
            sigma=sigma,
            slice_errors=(errors / norms).sqrt().float(),
            adapters=[adapter_entry(a, 0, float(error)) for a, error in zip(plain, whole, strict=True)],
        )
    return Collection.open(output, verify=False)


def _fixed_factors(one: LoraXS, name: str, base: BaseWeights | None) -> tuple[Tensor, Tensor]:
    """(B [d_out, r], A [r, d_in]) fp32: the saved ones, else from the base weights."""
    if name in one.fixed:
        key_a, key_b = one.fixed[name]
        return one.tensor(key_b), one.tensor(key_a)
    assert base is not None, "read_lora_xs refuses this"
    return base.lora_xs_factors(name, one.adapter.slices[name].rank)


def _check_same(one: LoraXS, name: str, mine: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> None:
    for side, own, others in zip("BA", mine, shared, strict=True):
        if own.shape != others.shape or float((own - others).norm()) > _SAME * float(others.norm()):
            raise JDLoRAError(
                f"{one.adapter.path / WEIGHTS_FILE}: {name}: lora_{side} is not that of the other adapters: they "
                "start from another base model, rank or precision; import them apart"
            )


def _stored(latent: Tensor, b: Tensor, a: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ [r, r] in the dtype of u for ΔW = b·latent·a (latent fp64, s folded in), ‖ΔW‖² and ‖ΔW − uΣv‖² (fp64).

    Where u and v hold b and a to the bit Σ is the latent itself, and the error is computed without cancellation.
    """
    whole = b.double() @ latent
    norm = squared_norm(whole, a)
    if torch.equal(u.float(), b) and torch.equal(v.float(), a):
        sigma = latent.to(u.dtype)
        return sigma, norm, squared_norm(b.double() @ (latent - sigma.double()), a)
    problem = SliceProblem.from_factors([Factors(whole.float(), a)], "import")
    sigma = (refit_sigma(problem, u, v)[0][0] if len(problem) else torch.zeros_like(latent)).to(u.dtype)
    return sigma, norm, squared_error(whole, a, u, sigma, v)


def _module_of(path: str, sides: Mapping[str, object], base: BaseWeights | None) -> str | None:
    """The module of a latent's name: the reading for which A and B, or base weights, exist; None for other names."""
    readings = [found["module"] for pattern in _LATENT if (found := pattern.fullmatch(path))]
    for module in readings:
        if module in sides or (base is not None and base.has(module)):
            return module
    # Nothing to compare with: the new form where the adapter's usual name stands there, else the old one.
    return (readings[0] if ".default_lora_latent" in path else readings[-1]) if readings else None


def _path(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _checked(weights: object, key: str, file: Path) -> tuple[int, int]:
    part = weights.get_slice(key)  # type: ignore[attr-defined]
    shape = part.get_shape()
    if part.get_dtype() not in _FLOATING or len(shape) != 2 or 0 in shape:
        raise JDLoRAError(
            f"{file}: {key[:200]!a} is {part.get_dtype()} {shape}; must be a matrix of fp16, bf16 or fp32"
        )
    if not bool(torch.isfinite(weights.get_tensor(key)).all()):  # type: ignore[attr-defined]
        raise JDLoRAError(f"{file}: {key[:200]!a}: holds NaN or infinity")
    return int(shape[0]), int(shape[1])


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise JDLoRAError(f"{file}: not a readable safetensors file ({error})") from error


def _folders(paths: Sequence[Path]) -> list[Path]:
    """Each path with an adapter in it, and the adapters one level below each path without."""
    folders = []
    for path in map(Path, paths):
        if (path / CONFIG_FILE).is_file():
            folders.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if (p / CONFIG_FILE).is_file()) if path.is_dir() else []
        if not inside:
            raise JDLoRAError(f"{path}: neither a LoRA-XS folder nor a folder of them (no {CONFIG_FILE} found)")
        folders += inside
    return folders


def _padded(basis: Tensor, dimension: int, rank: int) -> Tensor:
    missing = rank - basis.shape[dimension]
    return torch.nn.functional.pad(basis, (0, missing) if dimension == 1 else (0, 0, 0, missing)).contiguous()
