"""The plan of a step covers each token with an adapter exactly once, at fixed addresses, within the grids' bound."""

import time

import numpy as np
import pytest
import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.token_tiles import DECODE_ROWS, PREFILL_ROWS, TokenTiles, max_tiles


def random_step(rng: np.random.Generator, tokens: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of random lengths, as vLLM lays them out; −1 and skewed popularity among them."""
    cluster = np.repeat(rng.integers(-1, clusters, tokens), rng.integers(1, 5, tokens))[:tokens]
    if rng.random() < 0.3:
        cluster = np.minimum(rng.geometric(0.3, tokens) - 1, clusters - 1)
    slot = np.where(cluster < 0, -1, rng.integers(0, 5, tokens))
    return cluster, np.where(rng.random(tokens) < 0.1, -1, slot)


@pytest.mark.parametrize("seed", range(40))
def test_every_token_with_an_adapter_is_in_one_tile_of_its_cluster(seed):
    rng = np.random.default_rng(seed)
    clusters, capacity = int(rng.integers(1, 40)), 200
    plan = TokenTiles(capacity, clusters, "cpu")
    for tokens in rng.integers(1, capacity + 1, 4).tolist():  # each step must forget the one before
        cluster, slot = random_step(rng, tokens, clusters)
        plan.plan(cluster, slot)
        expected = [t for t in range(tokens) if cluster[t] >= 0 and slot[t] >= 0]
        assert (plan.tokens, plan.live) == (tokens, len(expected))
        token = plan.sorted_token.numpy()
        assert np.array_equal(plan.sorted_slot.numpy()[: plan.live], slot[token[: plan.live]])
        assert (plan.sorted_slot.numpy()[plan.live :] == -1).all()
        for rows in (DECODE_ROWS, PREFILL_ROWS):
            tiles = plan.tiles(rows).numpy().T
            used = tiles[tiles[:, 0] >= 0]
            assert (tiles[len(used) :] == -1).all() and len(used) <= max_tiles(tokens, rows, clusters)
            covered = []
            for owner, start, length in used:
                assert 1 <= length <= rows
                covered += token[start : start + length].tolist()
                assert (cluster[token[start : start + length]] == owner).all()
            assert sorted(covered) == expected


def test_the_grid_of_padded_tokens_holds_the_tiles_of_the_real_ones():
    for rows in (DECODE_ROWS, PREFILL_ROWS):
        for clusters in (1, 3, 100):
            counts = [max_tiles(tokens, rows, clusters) for tokens in range(300)]
            assert counts == sorted(counts)


def test_tensors_stay_where_graphs_were_captured_with_them_and_are_aligned():
    plan = TokenTiles(101, 7, "cpu")
    tensors = [plan.sorted_token, plan.sorted_slot, plan.tiles(DECODE_ROWS), plan.tiles(PREFILL_ROWS)]
    addresses = [t.data_ptr() for t in tensors]
    plan.plan(np.array([3, 3]), np.array([1, 2]))
    assert addresses == [t.data_ptr() for t in tensors]
    assert all((a - addresses[0]) % 16 == 0 for a in addresses)


def test_steps_that_do_not_fit_are_refused():
    plan = TokenTiles(4, 2, "cpu")
    with pytest.raises(JDLoRAError, match="max-num-batched-tokens"):
        plan.plan(np.zeros(5, np.int64), np.zeros(5, np.int64))
    with pytest.raises(JDLoRAError, match="1 clusters for 2"):
        plan.plan(np.zeros(1, np.int64), np.zeros(2, np.int64))
    plan.plan(np.empty(0, np.int64), np.empty(0, np.int64))
    assert plan.live == 0


def test_planning_256_sequences_of_a_full_prefill_step_is_cheap():
    """A third of a millisecond is the goal; machines under load get ten times that before this fails."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    cluster = np.repeat(rng.integers(0, 64, 256), 32)
    slot = np.repeat(rng.permutation(256), 32)
    plan = TokenTiles(8192, 128, "cpu")

    def seconds() -> float:
        start = time.perf_counter()
        plan.plan(cluster, slot)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 3e-3
