"""PEFT adapter folder -> ``Adapter``; every check on what comes from outside.

What is accepted and refused follows vLLM 0.32 (``vllm/lora/lora_model.py``, ``utils.py``; the config:
``peft_config.py``), with the shape and finiteness checks added that vLLM leaves out.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE, HEADS, MAX_MODULE_NAME, PeftConfig
from vllm_jdlora.tensor_file import Identity, StoredTensor, TensorFile, read_again

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_WEIGHTS = ("adapter_model.bin", "adapter_model.pt")
_PREFIX = "base_model.model."
_FLOATING = {"F16", "BF16", "F32"}
_MAX_NAME_BYTES = 200
_MOST_SECONDS = 10.0
# Files may have holes: a terabyte of zeros costs nobody anything, and its reader everything.
MOST_FILE_BYTES = 64 << 30
"""Most that an adapter's weights may have, with heads that were trained with it."""
_MOST_TENSOR_BYTES = 4 << 30


@dataclass(frozen=True)
class SliceShape:
    """One PEFT target module: its path without PEFT's prefix, e.g. ``model.layers.0.self_attn.q_proj``."""

    name: str
    d_out: int
    d_in: int


@dataclass(frozen=True)
class AdapterSlice:
    """What one adapter has in one slice: its rank ρ and scale s (α/ρ, or α/√ρ with rsLoRA)."""

    shape: SliceShape
    rank: int
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """One checked PEFT LoRA. Its weights stay on disk until ``factors`` is called.

    ``plain_only`` says why an adapter that vLLM can serve cannot be compressed; None for all others.
    ``parameters`` counts the numbers in A and B; ``sha256`` is the digest of the config and the weights. ``keys`` and
    ``places`` say how A and B of a slice are called and where they lie in the weights file, ``weights`` what that file
    was when it was checked.
    """

    name: str
    path: Path
    base_model: str | None
    rank: int
    sha256: str
    parameters: int
    slices: Mapping[str, AdapterSlice]
    keys: Mapping[str, tuple[str, str]]
    places: Mapping[str, tuple[StoredTensor, StoredTensor]]
    weights: Identity
    plain_only: str | None = None

    def factors(self, slice_name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(B [d_out, ρ], A [ρ, d_in])``, fp32, CPU, the scale s folded into B; None where it has nothing.

        Raises:
            JDLoRAError: the weights file changed or vanished since it was checked.
        """
        if slice_name not in self.slices:
            return None
        a, b = read_again(self.path / WEIGHTS_FILE, self.weights, self.places[slice_name])
        return b.float() * self.slices[slice_name].scale, a.float()


def read_adapter(path: Path, name: str | None = None) -> Adapter:
    """Read and check one PEFT folder; its name is the folder's unless given.

    Raises:
        JDLoRAError: the first thing found wrong, with the file and tensor it is in.
    """
    path = Path(path)
    name = folder_name(path) if name is None else name
    check_adapter_name(name)
    config = PeftConfig.read(path / CONFIG_FILE)
    weights_file = path / WEIGHTS_FILE
    if not weights_file.is_file():
        pickled = [other for other in _PICKLED_WEIGHTS if (path / other).exists()]
        hint = f"; convert {pickled[0]} with safetensors.torch.save_file (pickles are not read)" if pickled else ""
        raise JDLoRAError(f"{path}: no {WEIGHTS_FILE}{hint}")

    keys: dict[str, dict[str, str]] = {}
    slices: dict[str, AdapterSlice] = {}
    plain_only = f"modules_to_save {config.heads}" if config.heads else None
    parameters = 0
    weights = TensorFile(weights_file)
    if weights.identity.size > MOST_FILE_BYTES:
        raise JDLoRAError(f"{weights_file}: {weights.identity.size} bytes; no adapter is as large")
    for key in sorted(weights.tensors):
        parsed = _parse_tensor_name(key, weights_file)
        if parsed is None:
            continue
        module, side = parsed
        if module in HEADS:
            if module not in config.heads:
                raise JDLoRAError(f"{weights_file}: {key}: a head that modules_to_save does not name")
            continue
        if side in keys.setdefault(module, {}):
            raise JDLoRAError(f"{weights_file}: {key}: the second {side} for {module}; keep one")
        keys[module][side] = key
        parameters += _check_tensor(weights, key, weights_file)
        plain_only = plain_only or _plain_only_reason(key, module)
    started = time.monotonic()
    for module, pair in keys.items():
        if time.monotonic() - started > _MOST_SECONDS:
            raise JDLoRAError(f"{path / CONFIG_FILE}: its patterns take too long to match: name modules instead")
        slices[module] = _checked_slice(weights, weights_file, module, pair, config)
    if not slices:
        raise JDLoRAError(f"{weights_file}: no LoRA weights in it")
    digest = weights.digest()
    if weights.now() != weights.identity:
        raise JDLoRAError(f"{weights_file}: changed while it was read; read it again when it is at rest")
    return Adapter(
        name=name,
        path=path,
        base_model=config.base_model,
        rank=max(part.rank for part in slices.values()),
        sha256=_joined(file_digest(path / CONFIG_FILE), digest),
        parameters=parameters,
        slices=slices,
        keys={module: (pair["A"], pair["B"]) for module, pair in keys.items()},
        places={module: (weights.tensors[pair["A"]], weights.tensors[pair["B"]]) for module, pair in keys.items()},
        weights=weights.identity,
        plain_only=plain_only,
    )


def read_adapters(paths: Iterable[Path], *, skip_bad: bool = False) -> tuple[list[Adapter], list[tuple[str, str]]]:
    """Read PEFT folders, or folders of PEFT folders (one level deep).

    Returns:
        The adapters sorted by name, and ``(name, reason)`` of each one left out (always empty without
        ``skip_bad``).

    Raises:
        JDLoRAError: a bad adapter (without ``skip_bad``), two of one name, a missing folder, or none at all.
    """
    adapters: dict[str, Adapter] = {}
    skipped: list[tuple[str, str]] = []
    for folder in _adapter_folders(paths):
        name = folder_name(folder)
        if name in adapters:
            raise JDLoRAError(f"{folder}: a second adapter named {name!r} (the first: {adapters[name].path})")
        try:
            adapters[name] = read_adapter(folder)
        except JDLoRAError as error:
            if not skip_bad:
                raise
            skipped.append((name, str(error)))
    if not adapters:
        reason = f"; all {len(skipped)} were bad, the first: {skipped[0][1]}" if skipped else ""
        raise JDLoRAError(f"no adapters to read{reason}")
    return [adapters[name] for name in sorted(adapters)], sorted(skipped)


def folder_name(path: Path) -> str:
    """The name an adapter gets from its folder. Links keep their own name: caches link readable names to digests."""
    return os.path.basename(os.path.abspath(path))


def check_adapter_name(name: str) -> None:
    """Refuse what cannot be one folder's name and one line of text. Names are data, never paths."""
    problem = None
    if not name or name != name.strip():
        problem = "empty, or with blanks around it"
    elif not name.isprintable():
        problem = "with control characters"
    elif "/" in name or "\\" in name or ".." in name or name.startswith("."):
        problem = "looks like a path"
    elif len(name.encode()) > _MAX_NAME_BYTES:
        problem = f"longer than {_MAX_NAME_BYTES} bytes"
    if problem:
        raise JDLoRAError(f"adapter name {name[:80]!a} is not usable: {problem}; rename its folder")


def content_digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of config and weights: what makes two PEFT folders the same adapter."""
    return _joined(file_digest(path / CONFIG_FILE), file_digest(path / WEIGHTS_FILE))


def _joined(config: str, weights: str) -> str:
    return hashlib.sha256((config + weights).encode()).hexdigest()


def copy_files(adapter: Adapter, folder: Path) -> None:
    """The adapter's config and weights into a new folder.

    Raises:
        JDLoRAError: it is not what it was when it was read.
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter.path / name, folder / name)
    if content_digest(folder) != adapter.sha256:
        raise JDLoRAError(f"{adapter.path}: changed since it was read; start again when it is at rest")


def file_digest(path: Path) -> str:
    """SHA-256 of one file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise JDLoRAError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _parse_tensor_name(key: str, file: Path) -> tuple[str, str] | None:
    """``(module, "A" | "B")`` by vLLM's ``parse_fine_tuned_lora_name``; None for what vLLM passes over."""
    if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return None
    parts = key.removeprefix(_PREFIX).split(".")
    module = ""
    if parts[-1] == "weight" and len(parts) >= 3 and parts[-2] in ("lora_A", "lora_B"):
        module, side = ".".join(parts[:-2]), parts[-2][-1]
    elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        module, side = ".".join(parts[:-1]), parts[-1][-1]
    elif parts[-1] in ("weight", "bias") and len(parts) >= 2 and parts[-2] in HEADS:
        return parts[-2], ""
    if len(module) > MAX_MODULE_NAME:
        raise JDLoRAError(f"{file}: {key[:80]!a}… is {len(module)} characters long; no model has such a module")
    if not module or not module.isprintable() or " " in module or "" in module.split("."):
        raise JDLoRAError(f"{file}: {key[:200]!a} is not the name of a LoRA weight that vLLM reads")
    return module, side


def _plain_only_reason(key: str, module: str) -> str | None:
    if "lora_embedding_" in key or module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
        return f"a LoRA on the embedding or the output head ({module})"
    if "experts" in module.split("."):
        return f"a LoRA on mixture-of-experts weights ({module})"
    return None


def _check_tensor(weights: TensorFile, key: str, file: Path) -> int:
    """Check one tensor's dtype, dimensions and values; its number of elements."""
    dtype, shape, _ = weights.tensors[key]
    if dtype not in _FLOATING:
        raise JDLoRAError(f"{file}: {key}: dtype {dtype}; must be fp16, bf16 or fp32")
    if len(shape) != 2 or 0 in shape:
        raise JDLoRAError(f"{file}: {key}: shape {list(shape)}; must be a matrix that is not empty")
    if weights.tensors[key].nbytes > _MOST_TENSOR_BYTES:
        raise JDLoRAError(f"{file}: {key}: shape {list(shape)}; no matrix of a LoRA is as large")
    if not bool(torch.isfinite(weights.read(key)).all()):
        raise JDLoRAError(f"{file}: {key}: holds NaN or infinity; train or export this adapter again")
    return shape[0] * shape[1]


def _checked_slice(
    weights: TensorFile, file: Path, module: str, pair: Mapping[str, str], config: PeftConfig
) -> AdapterSlice:
    for side in "AB":
        if side not in pair:
            raise JDLoRAError(f"{file}: {module}: lora_{side} is missing")
    (rank_a, d_in), (d_out, rank_b) = (weights.tensors[pair[side]].shape for side in "AB")
    rank, scale = config.rank_and_scale(module)
    # vLLM splits fused expert weights by its own rules, and they are never compressed: no rank to compare.
    fused_experts = "experts" in (
        module.rsplit(".", 1)[-1],
        module.removesuffix(".base_layer").rsplit(".", 1)[-1],
    )
    if rank_a != rank_b or (rank_a != rank and not fused_experts):
        raise JDLoRAError(
            f"{file}: {module}: A is [{rank_a}, {d_in}], B is [{d_out}, {rank_b}], but {CONFIG_FILE} says rank {rank}"
        )
    return AdapterSlice(SliceShape(module, d_out, d_in), rank, scale)


def _adapter_folders(paths: Iterable[Path]) -> Sequence[Path]:
    """Each path that is an adapter, and the adapters inside each path that is not."""
    folders: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise JDLoRAError(f"{path}: no such folder")
        if _looks_like_adapter(path):
            folders.append(path)
            continue
        inside = [child for child in sorted(path.iterdir()) if child.is_dir() and _looks_like_adapter(child)]
        if not inside:
            raise JDLoRAError(f"{path}: neither a PEFT adapter nor a folder of them (no {CONFIG_FILE} found)")
        folders += inside
    return folders


def _looks_like_adapter(path: Path) -> bool:
    return any((path / file).exists() for file in (CONFIG_FILE, WEIGHTS_FILE, *_PICKLED_WEIGHTS))
