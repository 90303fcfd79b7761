"""Plans a step from its requests, and leaves the plan alone while the same requests go on and nothing has moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_jdlora.serving.adapter_directory import AdapterDirectory
from vllm_jdlora.serving.punica import JDPunica
from vllm_jdlora.serving.scaling_slots import ScalingSlots
from vllm_jdlora.serving.step_requests import StepRequests

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class _Planned:
    """What the plan at hand was made from.

    Attributes:
        key: LoRA ids and token counts, as bytes.
        adapters: the adapters' requests.
        slots: int64, Σ slots of the compressed adapters; −1 for other requests.
        plain: LoRA ids that are not compressed adapters.
    """

    key: tuple[bytes, bytes]
    adapters: list[LoRARequest]
    slots: np.ndarray
    plain: list[int]


class StepPlanner:
    """Turns a step's requests into base and scaling slot of each token, for the punica wrapper.

    Attributes:
        steps: how many steps there were.
        plans: how many of them were planned; the others repeated the step before.
    """

    def __init__(
        self,
        directory: AdapterDirectory,
        slots: ScalingSlots,
        punica: JDPunica,
        place_of_other: Callable[[int], tuple[int, int]],
    ):
        """
        Args:
            directory: of compressed adapters.
            slots: the same that the directory reads.
            punica: gets the plan.
            place_of_other: base and scaling slot of a LoRA id that the directory does not have.
        """
        self._directory, self._slots, self._punica = directory, slots, punica
        self._place_of_other = place_of_other
        self._planned: _Planned | None = None
        self.steps = self.plans = 0

    def forget(self) -> None:
        """An adapter has moved, or a weight has changed: the next step is planned anew."""
        self._planned = None

    def touch_if_planned(self, step: StepRequests) -> list[int] | None:
        """Whether the plan at hand serves this step too; if so its Σ count as just used.

        Returns:
            The LoRA ids of the step that are not compressed adapters, or ``None`` where the step must be planned.
        """
        self.steps += 1
        planned = self._planned
        if planned is None or planned.key != step.key or not step.asks_for(planned.adapters):
            return None
        self._slots.touch(planned.slots)
        return planned.plain

    def plan(self, step: StepRequests) -> None:
        """Plan a step whose adapters are all active."""
        self.plans += 1
        slots, plain = self.plan_runs(step.lora_ids, step.tokens)
        self._planned = _Planned(step.key, step.adapters, slots, plain)

    def plan_runs(self, lora_ids: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Plan runs of tokens with one LoRA id each; the plan serves this step alone.

        Returns:
            Σ slots of compressed adapters (−1 for other runs), and the LoRA ids that are not compressed adapters.
        """
        self._planned = None
        bases, slots = self._directory.places(lora_ids)
        compressed = slots.copy()
        others = np.flatnonzero((bases < 0) & (lora_ids > 0))
        ids = lora_ids[others].tolist()
        for run, lora_id in zip(others.tolist(), ids, strict=True):
            bases[run], slots[run] = self._place_of_other(lora_id)
        self._punica.update_tokens(np.repeat(bases, tokens), np.repeat(slots, tokens))
        return compressed, ids
