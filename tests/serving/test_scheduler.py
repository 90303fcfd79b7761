"""A batch holds no more adapters of a kind than there are slots of that kind, and each request is looked at once."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scheduler import _SlotLimits

SCALING_SLOTS, PLAIN_SLOTS = 3, 1


class Request:
    def __init__(self, lora_id: int | None, compressed: bool = True):
        self.looks = 0
        path = str(AdapterPath("r", 0, f"a{lora_id}")) if compressed else "folder"
        self._lora = None if lora_id is None else SimpleNamespace(lora_int_id=lora_id, lora_path=path)

    @property
    def lora_request(self):
        self.looks += 1
        return self._lora


class Queues:
    """vLLM's scheduler as far as slots are concerned: it takes the waiting requests that it may, in order."""

    def __init__(self, *, vllm_config):
        self.running, self.waiting = [], []

    def _handle_blocked_waiting_request(self, request):
        return True

    def schedule(self):
        for request in list(self.waiting):
            if self._handle_blocked_waiting_request(request):
                self.waiting.remove(request)
                self.running.append(request)


class Limited(_SlotLimits, Queues):
    pass


@pytest.fixture
def scheduler():
    options = {"collection": "c", "revision": "r", "scaling_slots": SCALING_SLOTS, "plain_slots": PLAIN_SLOTS}
    return Limited(vllm_config=SimpleNamespace(additional_config={"jdlora": options}))


def test_a_kind_of_adapter_waits_while_its_slots_are_taken(scheduler):
    scheduler.waiting = [
        *(Request(i) for i in (1, 1, 2, 3, 4)),
        Request(None),
        *(Request(i, compressed=False) for i in (10, 11, 10)),
        Request(2),
    ]
    first, waits = scheduler.waiting[0], [scheduler.waiting[4], scheduler.waiting[7]]
    scheduler.schedule()
    assert scheduler.waiting == waits
    scheduler.running = [r for r in scheduler.running if r._lora is None or r._lora.lora_int_id not in (1, 10)]
    assert first not in scheduler.running
    scheduler.schedule()
    assert not scheduler.waiting


def test_each_step_looks_at_who_runs_then(scheduler):
    scheduler.running = [Request(i) for i in (1, 2, 3)]
    scheduler.waiting = [Request(4)]
    scheduler.schedule()
    assert scheduler.waiting
    scheduler.running = [Request(i) for i in (5, 6, 7)]
    scheduler.waiting = [Request(8), Request(6)]
    scheduler.schedule()
    assert [r._lora.lora_int_id for r in scheduler.waiting] == [8]


def test_running_requests_are_looked_at_once_in_a_step_however_many_wait(scheduler):
    scheduler.running = [Request(1 + i % SCALING_SLOTS) for i in range(50)]
    scheduler.waiting = [Request(100 + i) for i in range(50)]
    scheduler.schedule()
    assert len(scheduler.waiting) == 50
    assert max(r.looks for r in scheduler.running) <= 3  # has it one, of which kind, which
