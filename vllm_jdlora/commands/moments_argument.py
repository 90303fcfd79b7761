"""Where a command gets second moments from: a file of them, or the base model run on calibration text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.adapter import Adapter, SliceShape
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.second_moments import SecondMoments


def moments_from(
    calibration: Path | None, base_model: str | None, slices: Sequence[SliceShape], show: Any, *, metric: str
) -> SecondMoments:
    """Second moments that a metric needs for the slices, gathered (and cached) unless a file of them is given.

    calibration: a file of moments (.safetensors), or of text. base_model: the folder that runs the text. metric:
    "activation" or "fisher". Raises JDLoRAError where neither a file of moments nor a folder is given.
    """
    from vllm_jdlora.evaluation.calibrated import moments_from as made

    of_file = calibration is not None and calibration.suffix == ".safetensors"
    if not of_file and (base_model is None or not Path(base_model).is_dir()):
        raise JDLoRAError(
            f"the {metric} metric runs the base model on calibration text: give its folder as --base-model, or moments "
            "from jdlora calibrate as --calibration"
        )
    return made(calibration, Path(base_model or ""), slices, gradients=metric == "fisher", progress=show)


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """For commands that change a collection; beside their --base-model."""
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="of a collection in the activation metric: its moments from jdlora calibrate (.safetensors), or its text, "
        "which the folder --base-model then runs",
    )


def moments_of_collection(
    collection: Collection, adapters: Sequence[Adapter], calibration: Path | None, base_model: str | None, show: Any
) -> SecondMoments | None:
    """Second moments for the slices of a collection and of adapters that come to it.

    None where the collection was fitted in the Frobenius norm, or where there is nothing to get them from. Raises
    JDLoRAError for a calibration that such a collection does not have.
    """
    manifest = collection.manifest
    if manifest.metric == "frobenius":
        if calibration is not None:
            raise JDLoRAError(f"{collection.path}: was fitted in the Frobenius norm: leave out --calibration")
        return None
    if calibration is None and (base_model is None or not Path(base_model).is_dir()):
        return None
    slices = {part.shape.name: part.shape for a in adapters if not a.plain_only for part in a.slices.values()}
    slices |= {part.name: part for part in manifest.slices}
    # The collection's own order first: what was gathered when it was compressed is found again.
    ordered = sorted(slices.values(), key=lambda part: part not in manifest.slices)
    return moments_from(calibration, base_model, ordered, show, metric=manifest.metric)
