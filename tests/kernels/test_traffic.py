"""The traffic model counts the bytes that one can count by hand, and serving chooses as it says."""

import itertools

import pytest

from vllm_jdlora.kernels import traffic
from vllm_jdlora.kernels.traffic import CARDS, MISTRAL_7B, ModuleShape
from vllm_jdlora.kernels.triton_grouped import fuses_scaling
from vllm_jdlora.kernels.triton_shrink import Launch

H100 = CARDS["H100"]
LAYER = list(MISTRAL_7B.values())
MEGABYTE = 1e6


def test_one_token_reads_one_adapter_or_one_pair_of_bases():
    shape = ModuleShape(64, (32, 16))
    a_and_b = 2 * 16 * (2 * 64 + 48)
    assert traffic.stock(shape, 1, 16, H100).weights == a_and_b
    assert traffic.compressed(shape, 1, 16, 9, H100, dense=False).weights == pytest.approx(a_and_b + 2 * 2 * 16 * 16)
    diagonal = traffic.compressed(shape, 1, 16, 9, H100, diagonal=True, dense=False)
    assert diagonal.weights == pytest.approx(a_and_b + 2 * 2 * 16)
    assert traffic.base(shape, 1, H100).weights == 2 * 64 * 48


def test_mistral_7b_is_what_its_adapters_are_known_to_weigh():
    """One rank-16 adapter on all seven slices: 84 MB in bf16, 2.6 MB a layer."""
    assert traffic.stock_layer(LAYER, 1, H100, 16).weights == pytest.approx(2.62 * MEGABYTE, rel=0.01)
    assert traffic.base_layer(LAYER, 1, H100).weights == pytest.approx(436 * MEGABYTE, rel=0.01)


def test_stock_reads_grow_with_tokens_and_ours_only_until_all_clusters_are_read():
    stock = [traffic.stock_layer(LAYER, tokens, H100, 16).weights for tokens in (64, 128)]
    ours = [traffic.layer(LAYER, tokens, H100, 16, 4).weights for tokens in (64, 128)]
    scalings = [tokens * 7 * 16 * 16 * 2 for tokens in (64, 128)]
    assert stock[1] == 2 * stock[0]
    assert ours[1] - scalings[1] == pytest.approx(ours[0] - scalings[0])
    assert traffic.clusters_used(10**6, 16) == pytest.approx(16)
    assert traffic.clusters_used(1, 16) == pytest.approx(1)


def test_bases_of_8_bits_move_half_and_a_scale_for_each_direction():
    shape = ModuleShape(64, (32, 16))
    numbers, scalings, scales = 16 * (2 * 64 + 48), 2 * 2 * 16 * 16, 4 * 2 * 16
    moved = traffic.compressed(shape, 1, 16, 9, H100, base_bits=8, dense=False)
    assert moved.weights == pytest.approx(numbers + 2 * scales + scalings)


def test_the_v_of_all_clusters_is_read_whoever_is_in_the_batch():
    shape = ModuleShape(64, (32, 16))
    v, rest = 2 * 2 * 16 * 64, 2 * 16 * 48 + 2 * 2 * 16 * 16
    by_cluster, dense = (traffic.compressed(shape, 1, 16, 9, H100, dense=dense).weights for dense in (False, True))
    assert by_cluster == pytest.approx(v + rest)
    assert dense == pytest.approx(9 * v + rest)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("base_bits", [16, 8])
@pytest.mark.parametrize("fused", [None, False])
def test_serving_takes_the_v_of_all_clusters_where_the_model_says(card, base_bits, fused):
    """Within 5 % of the better form with Σ in a launch of its own; within 12 % where the expand reads the parts of h,
    whose number differs between the forms."""
    chosen_dense = set()
    for tokens, clusters in itertools.product((1, 2, 4, 8, 12, 16), (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)):
        for rank, shape in itertools.product((8, 16, 32, 64), LAYER):
            times = {
                dense: traffic.compressed(
                    shape, tokens, rank, clusters, CARDS[card], base_bits=base_bits, dense=dense, fused=fused
                ).microseconds
                for dense in (True, False)
            }
            columns = len(shape.widths) * rank
            dense = Launch.of(
                tokens, clusters, columns, shape.d_in, 132, batch_invariant=False, number_bytes=base_bits // 8
            ).dense
            chosen_dense.add(dense)
            assert times[dense] <= (1.12 if fused is None else 1.05) * min(times.values()), (tokens, clusters, times)
    assert chosen_dense == {True, False}


def test_only_small_batches_take_the_v_of_all_clusters_and_none_whose_bits_must_not_change():
    assert Launch.of(16, 4, 48, 4096, 132, batch_invariant=False).dense
    assert not Launch.of(17, 1, 48, 4096, 132, batch_invariant=False).dense
    assert not Launch.of(1, 64, 48, 4096, 132, batch_invariant=False).dense
    assert not Launch.of(1, 1, 48, 4096, 132, batch_invariant=True).dense


def test_many_clusters_of_a_high_rank_read_more_than_plain_adapters_of_a_low_one():
    """The model must say where compression does not pay in speed."""
    assert traffic.layer(LAYER, 64, H100, 64, 64).weights > 2 * traffic.stock_layer(LAYER, 64, H100, 16).weights
    assert traffic.layer(LAYER, 256, H100, 16, 16).microseconds < traffic.stock_layer(LAYER, 256, H100, 16).microseconds


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_serving_applies_scalings_where_the_model_says(card, rank):
    """Within 15 % of the better place for every batch size; the rule is one line, the model is not."""
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        times = {
            fused: sum(
                traffic.compressed(shape, tokens, rank, 16, CARDS[card], fused=fused).microseconds for shape in LAYER
            )
            for fused in (True, False)
        }
        chosen = times[fuses_scaling(tokens, rank, batch_invariant=False)]
        # From R = 128 on registers forbid it (the compile gate), whatever launches would be saved.
        assert chosen <= 1.15 * min(times.values()) or (rank > 64 and tokens <= 8), (tokens, times)
