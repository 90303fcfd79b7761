"""Where a command gets second moments from: a file of them, or the base model run on calibration text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.adapter import SliceShape
    from vllm_jdlora.collection.second_moments import SecondMoments


def moments_from(
    calibration: Path | None, base_model: str | None, slices: Sequence[SliceShape], show: Any, *, asked_by: str
) -> SecondMoments:
    """Second moments of the slices' inputs, gathered (and cached) unless a file of them is given.

    calibration: a file of moments (.safetensors), or of text. base_model: the folder that runs the text. asked_by:
    what needs them, for messages. Raises JDLoRAError where neither a file of moments nor a folder is given.
    """
    from vllm_jdlora.collection.second_moments import SecondMoments

    if calibration is not None and calibration.suffix == ".safetensors":
        return SecondMoments.load(calibration)
    if base_model is None or not Path(base_model).is_dir():
        raise JDLoRAError(
            f"{asked_by} runs the base model on calibration text: give its folder as --base-model, or moments "
            "from jdlora calibrate as --calibration"
        )
    try:
        from vllm_jdlora.calibration import calibration_texts, gather_cached
    except ImportError as error:
        raise JDLoRAError(f"{asked_by} needs {error.name}: install vllm-jdlora[evaluate]") from None
    texts = calibration_texts(Path(base_model), calibration)
    return gather_cached(Path(base_model), texts, slices, progress=show)
