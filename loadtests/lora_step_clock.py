"""Inside a vLLM worker: how long the host works on a step's adapters before the model runs.

Given to ``vllm serve --worker-extension-cls lora_step_clock.LoRAStepClock`` and called by name through
``/collective_rpc``, which vLLM opens with VLLM_SERVER_DEV_MODE=1. It costs a step about a microsecond.
"""

from __future__ import annotations

import time
from typing import Any

EXTENSION = f"{__name__}.LoRAStepClock"


class LoRAStepClock:
    """Times ``set_active_loras`` of the worker's runner: finding, loading and planning the adapters of a step."""

    model_runner: Any

    def start_lora_clock(self) -> None:
        """Forget what was timed so far; put the clock in at the first call."""
        self._lora_seconds: list[float] = []
        if hasattr(self, "_lora_clock"):
            return
        self._lora_clock = original = self.model_runner.set_active_loras

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._lora_seconds.append(time.perf_counter() - start)

        self.model_runner.set_active_loras = timed

    def read_lora_clock(self) -> dict[str, list[float]]:
        """Microseconds of each step since the start."""
        return {"microseconds": [round(1e6 * seconds, 1) for seconds in self._lora_seconds]}
