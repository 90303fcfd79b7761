"""Second moments for an evaluation: of a file that has them, or gathered on text by running the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_jdlora.adapter import Adapter, SliceShape
from vllm_jdlora.calibration import Progress, calibration_texts, gather_cached
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError


def moments_from(
    file: Path | None,
    base_model: Path,
    slices: Sequence[SliceShape],
    *,
    gradients: bool = False,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> SecondMoments:
    """Of `file` if it ends in .safetensors, else gathered on its text (the package's own without one) or cached.

    gradients: those of the outputs too, for the fisher metric; without, a file's are left out.
    Raises JDLoRAError for moments that do not fit the slices, or lack the gradients.
    """
    if file is not None and file.suffix == ".safetensors":
        moments = SecondMoments.load(file)
        if gradients and not moments.gradients:
            raise JDLoRAError(f"{file}: holds no gradients; make it anew with jdlora calibrate, or give text")
        moments = moments if gradients else moments.of_inputs()
    else:
        texts = calibration_texts(base_model, file)
        moments = gather_cached(base_model, texts, slices, gradients=gradients, progress=progress, cache_dir=cache_dir)
    moments.check_fit(slices)
    return moments


def slices_of_all(adapters: Sequence[Adapter]) -> list[SliceShape]:
    """Every slice that any of the adapters has, those that cannot be compressed included."""
    return list({name: part.shape for adapter in adapters for name, part in adapter.slices.items()}.values())
