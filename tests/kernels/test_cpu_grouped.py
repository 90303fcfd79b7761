"""The CPU kernel means what the fp32 loops of ``reference.py`` mean, whoever is in the batch."""

import numpy as np
import pytest
import torch

from vllm_jdlora.kernels import cpu_grouped, reference
from vllm_jdlora.kernels.cpu_grouped import TokenGroups, jd_linear_

WIDTHS, D_IN, CLUSTERS, SLOTS = (48, 16, 24), 40, 5, 7


def popularity(kind: str, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Scaling slot of each token, −1 for the base model."""
    if kind == "identical":
        return np.full(tokens, 3)
    if kind == "distinct":
        return np.arange(tokens) % SLOTS
    if kind == "uniform":
        return rng.integers(-1, SLOTS, tokens)
    if kind == "skewed":
        return np.minimum(rng.geometric(0.5, tokens) - 1, SLOTS - 1)
    return np.full(tokens, -1)


def problem(tokens: int, rank: int, dtype: torch.dtype, diagonal: bool = False):
    g = torch.Generator().manual_seed(tokens * 1000 + rank)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    u = [rand(CLUSTERS, w, rank) / rank for w in WIDTHS]
    v = [rand(CLUSTERS, rank, D_IN) / D_IN**0.5 for _ in WIDTHS]
    sigma = rand(SLOTS, len(WIDTHS), rank) if diagonal else rand(SLOTS, len(WIDTHS), rank, rank)
    return rand(tokens, sum(WIDTHS)).to(dtype), rand(tokens, D_IN).to(dtype), u, v, sigma


def laid_out(u: list[torch.Tensor], v: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Bases of the reference in the kernel's layout."""
    return [x.transpose(0, 1).contiguous() for x in u], torch.cat(v, dim=1)


@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "skewed", "base"])
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 16, 33, 133, 512])
def test_mixed_batches_equal_the_reference(tokens, rank, kind):
    y, x, u, v, sigma = problem(tokens, rank, torch.float32)
    slots = popularity(kind, tokens, np.random.default_rng(tokens))
    clusters = np.where(slots < 0, -1, slots % CLUSTERS)
    expected = reference.jd_linear(y, x, u, v, sigma, clusters.tolist(), slots.tolist())
    out = y.clone()
    jd_linear_(out, x, *laid_out(u, v), sigma, TokenGroups.plan(clusters, slots))
    # fp32 sums of up to 64 products in another order
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    base = torch.from_numpy(slots < 0)
    assert torch.equal(out[base], y[base])


@pytest.mark.parametrize("kind", ["distinct", "uniform"])
def test_diagonal_scalings_equal_the_reference(kind):
    y, x, u, v, sigma = problem(33, 16, torch.float32, diagonal=True)
    slots = popularity(kind, 33, np.random.default_rng(1))
    clusters = np.where(slots < 0, -1, slots % CLUSTERS)
    expected = reference.jd_linear(y, x, u, v, sigma, clusters.tolist(), slots.tolist())
    jd_linear_(y, x, *laid_out(u, v), sigma, TokenGroups.plan(clusters, slots))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [4, 33])
def test_bf16_output_is_rounded_once(tokens):
    y, x, u, v, sigma = problem(tokens, 16, torch.bfloat16)
    slots = popularity("uniform", tokens, np.random.default_rng(0))
    clusters = np.where(slots < 0, -1, slots % CLUSTERS)
    expected = reference.jd_linear(y, x, u, v, sigma, clusters.tolist(), slots.tolist())
    before = y.clone()
    jd_linear_(y, x, *laid_out(u, v), sigma, TokenGroups.plan(clusters, slots))
    # half a unit in the last place of bf16, and the fp32 sums' own error near a tie
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-5)
    base = torch.from_numpy(slots < 0)
    assert torch.equal(y[base], before[base])


@pytest.mark.parametrize("all_clusters_at_once", [True, False])
def test_both_forms_of_expand_equal_the_reference(monkeypatch, all_clusters_at_once):
    monkeypatch.setattr(cpu_grouped, "_FLOPS_OF_A_CALL", 10**12 if all_clusters_at_once else 0)
    y, x, u, v, sigma = problem(33, 16, torch.float32)
    slots = popularity("uniform", 33, np.random.default_rng(3))
    clusters = np.where(slots < 0, -1, slots % CLUSTERS)
    expected = reference.jd_linear(y, x, u, v, sigma, clusters.tolist(), slots.tolist())
    jd_linear_(y, x, *laid_out(u, v), sigma, TokenGroups.plan(clusters, slots))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_plan_of_base_tokens_does_no_work():
    groups = TokenGroups.plan(np.full(4, -1), np.full(4, -1))
    assert groups.empty and groups.num_tokens == 4


def test_a_token_alone_and_in_a_crowd_gets_the_same_adapter():
    y, x, u, v, sigma = problem(16, 16, torch.float32)
    slots = np.arange(16) % SLOTS
    clusters = slots % CLUSTERS
    bases = laid_out(u, v)
    crowd = y.clone()
    jd_linear_(crowd, x, *bases, sigma, TokenGroups.plan(clusters, slots))
    for t in range(16):
        alone = y[t : t + 1].clone()
        jd_linear_(alone, x[t : t + 1], *bases, sigma, TokenGroups.plan(clusters[t : t + 1], slots[t : t + 1]))
        torch.testing.assert_close(alone[0], crowd[t], rtol=1e-5, atol=1e-5)
