"""The clock inside a worker times each step once, however often it is started."""

import time
from types import SimpleNamespace

import pytest
from lora_step_clock import EXTENSION, LoRAStepClock


def test_steps_since_the_start_are_timed_and_still_work():
    calls = []

    def set_active_loras(batch, *, tokens):
        calls.append((batch, tokens))
        time.sleep(0.002)
        if batch == "bad":
            raise ValueError(batch)
        return "done"

    worker = LoRAStepClock()
    worker.model_runner = SimpleNamespace(set_active_loras=set_active_loras)
    worker.start_lora_clock()
    worker.model_runner.set_active_loras("a", tokens=1)
    worker.start_lora_clock()
    assert worker.model_runner.set_active_loras("b", tokens=2) == "done"
    with pytest.raises(ValueError, match="bad"):
        worker.model_runner.set_active_loras("bad", tokens=3)
    times = worker.read_lora_clock()["microseconds"]
    assert calls == [("a", 1), ("b", 2), ("bad", 3)]
    # Twice in the clock would be twice in the list.
    assert len(times) == 2 and all(t >= 2000 for t in times)
    assert EXTENSION == "lora_step_clock.LoRAStepClock"
