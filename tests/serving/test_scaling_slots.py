"""The least-recently-used cache of scaling slots."""

import pytest

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.scaling_slots import ScalingSlots


def fill(slots: ScalingSlots, *adapters: int) -> None:
    for adapter in adapters:
        slots.occupy(adapter, slots.victim())


def test_the_least_recently_used_adapter_gives_up_its_slot():
    slots = ScalingSlots(2)
    fill(slots, 7, 8)
    slot_of_8 = slots.slot(8)
    slots.touch(7)
    fill(slots, 9)
    assert 8 not in slots and 7 in slots and slots.slot(9) == slot_of_8


def test_a_pinned_adapter_is_never_evicted():
    slots = ScalingSlots(2)
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


def test_a_copy_that_fails_leaves_no_half_written_slot():
    slots = ScalingSlots(1)
    fill(slots, 1)
    first = slots.victim()  # the copy into it fails: occupy() is never called
    assert len(slots) == 0 and slots.touch(1) is None
    assert slots.victim() == first
    fill(slots, 2)
    assert slots.slot(2) == first


def test_no_two_adapters_share_a_slot():
    slots = ScalingSlots(3)
    for adapter in [5, 6, 7, 5, 8, 9, 6, 5, 7]:
        if slots.touch(adapter) is None:
            fill(slots, adapter)
        resident = [a for a in range(10) if a in slots]
        assert len({slots.slot(a) for a in resident}) == len(resident) <= 3
