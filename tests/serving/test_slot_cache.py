"""The least-recently-used cache of slots."""

import numpy as np
import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.slot_cache import SlotCache

ADAPTERS = 10


def made(slots: int) -> SlotCache:
    cache = SlotCache(slots)
    cache.reserve(ADAPTERS)
    return cache


def fill(slots: SlotCache, *adapters: int) -> None:
    for adapter in adapters:
        slots.occupy(adapter, slots.victim())


def slot(slots: SlotCache, adapter: int) -> int:
    return int(slots.slots(np.array([adapter]))[0])


def touch(slots: SlotCache, *adapters: int) -> None:
    slots.touch(slots.slots(np.array(adapters, dtype=np.int64)))


def test_the_least_recently_used_adapter_gives_up_its_slot():
    slots = made(2)
    fill(slots, 7, 8)
    slot_of_8 = slot(slots, 8)
    touch(slots, 7, -1)
    fill(slots, 9)
    assert 8 not in slots and 7 in slots and slot(slots, 9) == slot_of_8
    assert slots.slots(np.array([8, -1])).tolist() == [-1, -1]


def test_a_pinned_adapter_is_never_evicted():
    slots = made(2)
    fill(slots, 1, 2)
    slots.pin(1)
    fill(slots, 3)
    assert 1 in slots and 2 not in slots
    slots.pin(3)
    with pytest.raises(JDLoRAError, match="--jd-scaling-slots"):
        slots.victim()
    slots.unpin(1)
    fill(slots, 4)
    assert 1 not in slots
    with pytest.raises(KeyError):
        slots.pin(1)


def test_a_copy_that_fails_leaves_no_half_written_slot():
    slots = made(1)
    fill(slots, 1)
    first = slots.victim()  # the copy into it fails: occupy() is never called
    assert len(slots) == 0 and 1 not in slots
    assert slots.victim() == first
    fill(slots, 2)
    assert slot(slots, 2) == first


def test_no_two_adapters_share_a_slot_and_a_step_evicts_none_of_its_own():
    rng = np.random.default_rng(0)
    slots = made(4)
    for _ in range(200):
        step = rng.choice(ADAPTERS, rng.integers(1, 4), replace=False).tolist()
        present = [a for a in step if a in slots]
        touch(slots, *present)
        fill(slots, *(a for a in step if a not in present))
        resident = [a for a in range(ADAPTERS) if a in slots]
        assert set(step) <= set(resident)
        assert len({slot(slots, a) for a in resident}) == len(resident) == len(slots) <= 4


def test_keys_that_come_later_find_room_and_what_was_there_stays():
    slots = made(3)
    fill(slots, 1)
    fill(slots, 5000)
    assert 1 in slots and 5000 in slots and 4999 not in slots
    assert 10**6 not in slots  # never reserved
    slots.reserve(10**6)
    assert slots.slots(np.array([-1, 999_999])).tolist() == [-1, -1]
    assert slot(slots, 1) >= 0 and slot(slots, 5000) >= 0


def test_an_evicted_key_is_told_of_once_and_a_key_that_is_taken_out_is_not():
    slots, told = made(1), []
    slots.on_evict = told.append
    fill(slots, 1)
    slots.pin(1)
    slots.evict(1)
    slots.evict(1)
    assert told == [] and len(slots) == 0
    fill(slots, 2, 3)  # the pin went with the key that had it
    assert told == [2]


def test_cleared_slots_are_given_out_from_the_first():
    slots = made(3)
    fill(slots, 4, 5, 6)
    slots.clear()
    assert len(slots) == 0
    fill(slots, 7, 8)
    assert (slot(slots, 7), slot(slots, 8)) == (0, 1)
