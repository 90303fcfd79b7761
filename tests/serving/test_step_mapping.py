"""A step's LoRA ids become bases and scaling slots: of each token, in any order, without a sort."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LRUCacheLoRAModelManager

from vllm_jdlora.serving.manager import FIRST_BASE_ID, JDLoRAModelManager
from vllm_jdlora.serving.scaling_slots import ScalingSlots

IDENTITY = 4


@pytest.fixture
def manager():
    """Adapters 0 and 2 of a collection of three, in clusters 1 and 0, as LoRA 11 and 12; 13 is plain, 14 a dummy."""
    made = JDLoRAModelManager.__new__(JDLoRAModelManager)
    made._adapter_of_id, made._dummies = {11: 0, 12: 2}, {14}
    made._cluster_of, made._slots = [1, 1, 0], ScalingSlots(4)
    made._slots.occupy(0, made._slots.victim())
    made._slots.occupy(2, made._slots.victim())
    made._scaling_slots, made._identity_slot = 4, IDENTITY
    made.collection = SimpleNamespace(manifest=SimpleNamespace(clusters=2))
    return made


def test_every_token_gets_the_base_and_slot_of_its_adapter(manager):
    ids = (11, 11, 0, 12, 13, 13, 11, 14, 0, 0)
    bases, slots = manager._bases_and_slots(ids)
    first, second = FIRST_BASE_ID, FIRST_BASE_ID + 1
    assert bases.tolist() == [second, second, 0, first, 13, 13, second, first, 0, 0]
    assert slots.tolist() == [0, 0, -1, 1, IDENTITY, IDENTITY, 0, 2, -1, -1]
    assert [part.tolist() for part in manager._bases_and_slots(())] == [[], []]


def test_vllm_gets_bases_and_the_wrapper_slots(manager, monkeypatch):
    told = {}
    monkeypatch.setattr(LRUCacheLoRAModelManager, "_set_adapter_mapping", lambda _, mapping: told.update(stock=mapping))
    manager._punica = SimpleNamespace(update_scaling_slots=lambda slots: told.update(slots=slots.tolist()))
    manager._set_adapter_mapping(LoRAMapping((12, 12, 0), (12, 0), True))
    assert np.asarray(told["stock"].index_mapping).tolist() == [FIRST_BASE_ID, FIRST_BASE_ID, 0]
    assert told["stock"].prompt_mapping == (FIRST_BASE_ID, 0) and told["stock"].is_prefill
    assert told["slots"] == [1, 1, -1]
