"""Second moments of modules' inputs and gradients, and the one file that keeps them (no transformers here)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.errors import JDLoRAError

FORMAT_VERSION = 2
_HEADER = "second_moments"
_DIGEST = re.compile(r"[0-9a-f]{64}")
# Moments are written in fp32: entries of a rounded C differ from their mirror image not at all, and its
# eigenvalues by up to 2⁻²⁴ tr(C). A larger asymmetry or negative direction is damage, not rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Origin:
    """Where second moments come from.

    Attributes:
        base_model: its folder's name, and the SHA-256 of its config.json.
        text_sha256: of the calibration texts (:func:`vllm_jdlora.calibration_text.text_sha256`).
        texts: how many there were.
        tokens: how many positions were counted; the first of each text is not.
        max_tokens: where texts were cut.
        dtype: the model's while it ran.
        adapter_sha256: of the adapter that was active, None for the base model alone.
    """

    base_model: BaseModel
    text_sha256: str
    texts: int
    tokens: int
    max_tokens: int
    dtype: str
    adapter_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """C = E[xxᵀ] of the input of each slice; slices that read the same x (packed q, k, v) share one matrix.

    And, where the loss was differentiated, G = E[ggᵀ] of the gradients g = ∂loss/∂y at each slice's output y.

    Attributes:
        origin: what they were gathered from.
        inputs: slice name → key of its C in ``matrices``.
        matrices: key → C [d_in, d_in] or G [d_out, d_out], fp32, symmetric, the mean over tokens. Mapped from the file
            after ``load``.
        gradients: slice name → key of its G in ``matrices``; empty without.
    """

    origin: Origin
    inputs: Mapping[str, str]
    matrices: Mapping[str, Tensor]
    gradients: Mapping[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Of a collection that is fitted with these moments: ``fisher`` with gradients, else ``activation``."""
        return "fisher" if self.gradients else "activation"

    def of_inputs(self) -> SecondMoments:
        """The same without gradients."""
        kept = {key: self.matrices[key] for key in set(self.inputs.values())}
        return replace(self, matrices=kept, gradients={})

    def gradients_of(self, slice_name: str) -> Tensor | None:
        """G [d_out, d_out] fp32 of one slice's output; None where the loss was not differentiated.

        Raises JDLoRAError for a slice that was not gathered.
        """
        if not self.gradients:
            return None
        if slice_name not in self.gradients:
            raise JDLoRAError(_missing(slice_name))
        return self.matrices[self.gradients[slice_name]]

    def of(self, slice_name: str) -> Tensor:
        """C [d_in, d_in] fp32 of one slice's input. Raises JDLoRAError for a slice that was not gathered."""
        if slice_name not in self.inputs:
            raise JDLoRAError(_missing(slice_name))
        return self.matrices[self.inputs[slice_name]]

    def check_fit(self, slices: Sequence[SliceShape], fingerprint: str | None = None) -> None:
        """Refuse moments that lack a slice, have another d_in, or are of a model with another config.json.

        fingerprint: SHA-256 of the base model's config.json, None where it is not at hand.
        """
        own = self.origin.base_model
        if fingerprint is not None and own.fingerprint != fingerprint:
            raise JDLoRAError(f"the second moments are of another base model ({own.name}): calibrate again")
        for part in slices:
            d_in = self.of(part.name).shape[0]
            if d_in != part.d_in:
                raise JDLoRAError(f"the second moment of {part.name} has {d_in} inputs, its adapters {part.d_in}")
            g = self.gradients_of(part.name)
            if g is not None and g.shape[0] != part.d_out:
                raise JDLoRAError(f"the gradients of {part.name} have {g.shape[0]} outputs, its adapters {part.d_out}")

    def save(self, file: Path) -> None:
        """Write one safetensors file, atomically. An existing file is replaced.

        Raises:
            JDLoRAError: the disk refuses.
        """
        file = Path(file).absolute()
        header = {
            "format_version": FORMAT_VERSION,
            "origin": asdict(self.origin),
            "inputs": dict(self.inputs),
            "gradients": dict(self.gradients),
        }
        layout = {key: (matrix.dtype, tuple(matrix.shape)) for key, matrix in self.matrices.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as new:
                write_streamed(new, layout, self.matrices.values(), {_HEADER: json.dumps(header)})
        except (OSError, SafetensorError) as error:
            problem = getattr(error, "strerror", None) or error
            raise JDLoRAError(f"{file}: cannot be written ({problem}); nothing was changed") from error

    @staticmethod
    def load(file: Path, *, verify: bool = True) -> SecondMoments:
        """Open a file that ``save`` wrote; matrices are mapped, not read.

        Args:
            file: what to open.
            verify: also read each matrix once: finite, symmetric, no negative directions.

        Raises:
            JDLoRAError: with what is wrong.
        """
        file = Path(file)
        try:
            with safe_open(file, framework="pt") as content:
                origin, inputs, gradients = _parsed_header((content.metadata() or {}).get(_HEADER))
                matrices = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise JDLoRAError(f"{file}: not a readable safetensors file ({error})") from error
        except JDLoRAError as error:
            raise JDLoRAError(f"{file}: {error}; make it anew with jdlora calibrate") from error
        try:
            if {*inputs.values(), *gradients.values()} != set(matrices):
                raise JDLoRAError("its list of slices and its matrices do not belong together")
            for key, matrix in matrices.items():
                _check_matrix(key, matrix, content=verify)
        except JDLoRAError as error:
            raise JDLoRAError(f"{file}: damaged: {error}; make it anew with jdlora calibrate") from error
        return SecondMoments(origin, inputs, matrices, gradients)


def _check_matrix(key: str, c: Tensor, *, content: bool) -> None:
    if c.ndim != 2 or c.shape[0] != c.shape[1] or c.shape[0] == 0 or c.dtype != torch.float32:
        raise JDLoRAError(f"{key} is {list(c.shape)} in {c.dtype}, not square in fp32")
    if not content:
        return
    if not bool(c.isfinite().all()):
        raise JDLoRAError(f"{key} holds NaN or infinity")
    energy = float(c.diagonal().double().sum())
    if energy <= 0 or bool((c.diagonal() < 0).any()):
        raise JDLoRAError(f"{key} is not a second moment (energies that are negative or all zero)")
    if float((c - c.T).abs().max()) > _ROUNDING * energy:
        raise JDLoRAError(f"{key} is not symmetric")
    lifted = c.double()
    lifted.diagonal().add_(_ROUNDING * energy)
    if int(torch.linalg.cholesky_ex(lifted).info):
        raise JDLoRAError(f"{key} is not a second moment (it has negative directions)")


def _parsed_header(text: str | None) -> tuple[Origin, dict[str, str], dict[str, str]]:
    try:
        raw: Any = json.loads(text or "null")
    except (ValueError, RecursionError) as error:
        raise JDLoRAError(f"its header is not readable as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise JDLoRAError("holds no second moments")
    if raw.get("format_version") != FORMAT_VERSION:
        raise JDLoRAError(f"format version {raw.get('format_version')!r:.20}, this program reads {FORMAT_VERSION}")
    inputs, gradients = (_names(raw.get(field)) for field in ("inputs", "gradients"))
    if not inputs or (gradients and set(gradients) != set(inputs)):
        raise JDLoRAError("its header lacks the list of slices")
    try:
        fields = dict(raw["origin"])
        origin = Origin(**{**fields, "base_model": BaseModel(**fields["base_model"])})
    except (KeyError, TypeError, ValueError) as error:
        raise JDLoRAError(f"its header does not say where it comes from ({error})") from error
    counts = (origin.texts, origin.tokens, origin.max_tokens)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise JDLoRAError("its header has no count of texts and tokens")
    if not isinstance(origin.text_sha256, str) or not _DIGEST.fullmatch(origin.text_sha256):
        raise JDLoRAError("its header has no digest of the text")
    return origin, inputs, gradients


def _missing(slice_name: str) -> str:
    return (
        f"no second moment for {slice_name}: calibrate with the modules of these adapters (jdlora calibrate --adapters)"
    )


def _names(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value.values()):
        raise JDLoRAError("its header lacks the list of slices")
    return value
