"""Weights of a base model folder, one matrix at a time, and the A and B that LoRA-XS computes from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseWeights:
    """A folder with ``model.safetensors``, or shards with an index; nothing is read before it is asked for."""

    def __init__(self, folder: Path, files: Mapping[str, str]):
        self._folder = folder
        self._files = files

    @classmethod
    def open(cls, folder: str | Path) -> BaseWeights | None:
        """None where `folder` is no folder with safetensors weights (then it is a model's name).

        Raises:
            JDLoRAError: the weights' index or file cannot be read.
        """
        folder = Path(folder)
        if (folder / _INDEX).is_file():
            try:
                files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
                # A file's name comes from outside: it must lie in the folder itself.
                wrong = [name for name in files.values() if Path(name).name != name]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise JDLoRAError(f"{folder / _INDEX}: not a readable index ({error})") from error
            if wrong:
                raise JDLoRAError(f"{folder / _INDEX}: {wrong[0]!a} is not a file's name")
            return cls(folder, files)
        if not (folder / _SINGLE).is_file():
            return None
        try:
            with safe_open(folder / _SINGLE, framework="pt") as weights:
                return cls(folder, {key: _SINGLE for key in weights.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise JDLoRAError(f"{folder / _SINGLE}: not a readable safetensors file ({error})") from error

    def has(self, module: str) -> bool:
        return f"{module}.weight" in self._files

    def shape(self, module: str) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self._read(module, shape_only=True).shape
        return d_out, d_in

    def lora_xs_factors(self, module: str, rank: int) -> tuple[Tensor, Tensor]:
        """(B [d_out, r], A [r, d_in]) fp32 as the authors' code makes them: Wᵀ = P S Qᵀ, A = (P_r S_r)ᵀ, B = Q_r.

        The base weights do not determine them: each pair of singular vectors may come out with the other sign on
        another machine or library (and pairs of equal singular values rotated), and M belongs to the signs of its
        training. The authors' first versions used a randomised SVD, and ``retain_part`` may have been "bottom".
        Adapters that were saved with A and B need none of this.
        """
        left, singular, right = torch.linalg.svd(self._read(module).float().T, full_matrices=False)
        return right[:rank].T.contiguous(), (left[:, :rank] * singular[:rank]).T.contiguous()

    def _read(self, module: str, *, shape_only: bool = False) -> Tensor:
        key = f"{module}.weight"
        if key not in self._files:
            raise JDLoRAError(f"{self._folder}: has no {key}: the adapter is for another base model")
        file = self._folder / self._files[key]
        try:
            with safe_open(file, framework="pt") as weights:
                if shape_only:
                    return torch.empty(weights.get_slice(key).get_shape(), device="meta")
                return weights.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise JDLoRAError(f"{file}: {key} cannot be read ({error})") from error
