"""Which points Figure 1 has, and that slots of equal memory have equal memory."""

import pytest
from figure1_points import BASES, COUNTS, LARGER_BASES, OURS_ONLY, RANK, SERIES, LoRABytes, points_of

from vllm_jdlora.adapter import SliceShape

SLICES = [
    SliceShape("model.layers.0.self_attn.q_proj", 576, 576),
    SliceShape("model.layers.0.self_attn.k_proj", 192, 576),
]


def by_key(points):
    return {(p.series, p.adapters): p for p in points}


def test_the_figure_has_every_series_at_every_number_of_adapters():
    points = by_key(points_of(SLICES))
    for key in "cde":
        assert [n for k, n in points if k == key] == list(COUNTS)
    assert [n for k, n in points if k == "f"] == [*COUNTS, *OURS_ONLY]
    assert [n for k, n in points if k == "f8"] == [64, 1024, *OURS_ONLY]
    assert [n for k, n in points if k == "f-rank16"] == [4, 16, 64, 256, 1024, *OURS_ONLY]
    assert [n for k, n in points if k == "b"] == [1] and [n for k, n in points if k == "c-default"] == [1024]


def test_columns_are_finished_one_after_the_other():
    counts = [p.adapters for p in points_of(SLICES)]
    assert counts == sorted(counts)


def test_slots_and_bases_take_what_is_allocated_for_them():
    memory = LoRABytes(tuple(SLICES))
    assert memory.slot == 2 * RANK * (576 + 576 + 192 + 576)
    bases, sigma = 2 * 8 * (576 + 576 + 192 + 576), 10 * len(SLICES) * 8 * 8 * 2
    assert memory.compressed(10, 3, 8) == 3 * bases + sigma
    # A byte for each number, and fp32 scales for R directions of U and of V in each slice.
    assert memory.compressed(10, 3, 8, "int8") == 3 * (bases // 2 + len(SLICES) * 2 * 8 * 4) + sigma


@pytest.mark.parametrize("adapters", COUNTS)
def test_equal_slots_take_what_compressed_adapters_take_at_most_rounded_up(adapters):
    memory = LoRABytes(tuple(SLICES))
    points = by_key(points_of(SLICES))
    ours, stock = points["f", adapters], points["c", adapters]
    assert (ours.rank, ours.clusters) == (8, BASES.clusters(adapters)) and ours.clusters == -(-adapters // 2)
    larger = memory.compressed(adapters, LARGER_BASES.clusters(adapters), LARGER_BASES.rank)
    assert ours.lora_bytes < larger < 1.06 * ours.lora_bytes
    assert 0 <= stock.lora_bytes - larger < memory.slot or stock.slots == adapters
    assert points["e", adapters].slots == stock.slots and points["d", adapters].slots == adapters


def test_series_counts_and_clusters_can_be_chosen():
    points = by_key(points_of(SLICES, series=["b", "c", "f"], counts=[8, 10_000], clusters={10_000: 256}))
    assert set(points) == {("b", 1), ("c", 8), ("f", 8), ("f", 10_000)}
    assert points["f", 10_000].clusters == 256 and points["f", 8].clusters == 4
    assert not points_of(SLICES, series=["c-default"], counts=[8])


def test_series_are_told_apart_by_their_keys():
    assert len({series.key for series in SERIES}) == len(SERIES)
