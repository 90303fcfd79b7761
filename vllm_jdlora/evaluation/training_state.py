"""The checkpoint of a training: one safetensors file with LoRA weights, AdamW's moments, and progress as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.errors import JDLoRAError

_HEADER = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training is; the order of batches and the learning rate follow from the step and the settings.

    Attributes:
        losses: of each step.
        validation: (step, loss) wherever it was measured.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        return min(self.validation, key=lambda pair: pair[1])


def save_checkpoint(
    file: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write, atomically.

    Args:
        file: replaced if it exists.
        identity: JSON of what makes two runs the same.
        progress: see there.
        weights: name → parameter, as in the optimizer.
        optimizer: AdamW after at least one step.
        best: weights of the lowest validation loss so far; empty before the first.
    """
    tensors = {f"best.{name}": value for name, value in best.items()}
    for name, parameter in weights.items():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": optimizer.state[parameter][key] for key in _MOMENTS}
    header = json.dumps({"identity": identity, "progress": asdict(progress)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            save_file(tensors, new, metadata={_HEADER: header})
    except (OSError, SafetensorError) as error:
        raise JDLoRAError(f"{file}: cannot be written ({error})") from error


@torch.no_grad()
def load_checkpoint(
    file: Path, identity: Mapping[str, Any], weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Put a checkpoint's weights and moments in place; the progress and the best weights so far.

    Raises:
        JDLoRAError: of a run with another identity, or damaged.
    """
    try:
        with safe_open(file, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get(_HEADER, "{}"))
            if header.get("identity") != identity:
                raise JDLoRAError(f"{file}: of a run with other settings; remove it to start anew")
            # clone: the optimizer writes to them, and the file is mapped.
            tensors = {key: content.get_tensor(key).clone() for key in content.keys()}  # noqa: SIM118
        raw = header["progress"]
        progress = Progress(**{**raw, "validation": [(step, loss) for step, loss in raw["validation"]]})
        for name, parameter in weights.items():
            parameter.copy_(tensors[f"weight.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise JDLoRAError(f"{file}: damaged ({error}); remove it to start anew") from error
    return progress, {key.removeprefix("best."): value for key, value in tensors.items() if key.startswith("best.")}
