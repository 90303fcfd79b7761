"""Plans a step from its requests, and leaves the plan alone while the same requests go on and nothing has moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vllm_jdlora.serving.adapter_directory import AdapterDirectory
from vllm_jdlora.serving.base_residency import ResidentBases
from vllm_jdlora.serving.punica import JDPunica
from vllm_jdlora.serving.slot_cache import SlotCache
from vllm_jdlora.serving.step_requests import StepRequests

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class Places(NamedTuple):
    """Base and Σ slots of the compressed adapters of a step, int64 [requests] each; −1 for other requests."""

    bases: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class _Planned:
    """What the plan at hand was made from.

    Attributes:
        key: LoRA ids and token counts, as bytes.
        adapters: the adapters' requests.
        places: of the compressed adapters.
        plain: LoRA ids that are not compressed adapters.
    """

    key: tuple[bytes, bytes]
    adapters: list[LoRARequest]
    places: Places
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
        slots: SlotCache,
        bases: ResidentBases,
        punica: JDPunica,
        place_of_other: Callable[[int], tuple[int, int]],
    ):
        """
        Args:
            directory: of compressed adapters.
            slots: the same that the directory reads.
            bases: brings the clusters of a step to the device.
            punica: gets the plan.
            place_of_other: base and scaling slot of a LoRA id that the directory does not have.
        """
        self._directory, self._slots, self._bases, self._punica = directory, slots, bases, punica
        self._place_of_other = place_of_other
        self._planned: _Planned | None = None
        self.steps = self.plans = 0
        self._ids = self._numbers = np.empty(0, dtype=np.int64)
        self._distinct: tuple[int, int] | None = None

    @property
    def lora_ids(self) -> list[int]:
        """LoRA ids of the last step, with repetitions and 0 for the base model."""
        ids: list[int] = self._ids.tolist()
        return ids

    @property
    def adapters_in_step(self) -> int:
        """Different adapters of the last step, plain ones included."""
        return self._count()[0]

    @property
    def clusters_in_step(self) -> int:
        """Different clusters of the last step."""
        return self._count()[1]

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
        self._slots.touch(planned.places.slots)
        self._bases.touch(planned.places.bases)
        return planned.plain

    def plan(self, step: StepRequests) -> None:
        """Plan a step whose adapters are all active."""
        self.plans += 1
        places, plain = self.plan_runs(step.lora_ids, step.tokens)
        self._planned = _Planned(step.key, step.adapters, places, plain)

    def plan_runs(self, lora_ids: np.ndarray, tokens: np.ndarray) -> tuple[Places, list[int]]:
        """Plan runs of tokens with one LoRA id each; the plan serves this step alone.

        Returns:
            Places of compressed adapters, and the LoRA ids that are not compressed adapters.

        Raises:
            JDLoRAError: more clusters than base slots.
        """
        self._planned = self._distinct = None
        bases, slots = self._directory.places(lora_ids)
        self._ids, self._numbers = lora_ids.copy(), bases
        bases = self._bases.slots(bases)
        compressed = Places(bases.copy(), slots.copy())
        others = np.flatnonzero((bases < 0) & (lora_ids > 0))
        ids = lora_ids[others].tolist()
        for run, lora_id in zip(others.tolist(), ids, strict=True):
            bases[run], slots[run] = self._place_of_other(lora_id)
        self._punica.update_tokens(np.repeat(bases, tokens), np.repeat(slots, tokens))
        return compressed, ids

    def _count(self) -> tuple[int, int]:
        if self._distinct is None:
            self._distinct = len(set(self._ids.tolist()) - {0}), len(set(self._numbers.tolist()) - {-1})
        return self._distinct
