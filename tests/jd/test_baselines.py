"""Every baseline against a dense computation of its own, and the numbers it says it stores counted one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.jd.dense import dense, family_factors, hooi, random_factors, unit
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd import published
from vllm_jdlora.jd.baselines import BaselineFit, factor_pca, random_assignment, random_labels, svd_each
from vllm_jdlora.jd.merging import average, ties
from vllm_jdlora.jd.problem import Factors
from vllm_jdlora.jd.published import jd_published, published_labels

# Results are rounded to fp32 factors (6e-8 of entries up to 30).
FP32 = {"rtol": 1e-5, "atol": 1e-4}


def result(fit: BaselineFit, i: int) -> Tensor:
    factors = fit.factors[i]
    assert factors is not None
    return dense(factors)


def best_of_rank(w: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(w)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


MIXED = [*random_factors(4, 20, 14, [3, 5, 2, 5]), None]


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_each_adapters_svd_is_the_dense_one(rank: int) -> None:
    fit = svd_each(MIXED, rank)
    assert fit.factors[4] is None
    for i, f in enumerate(MIXED[:4]):
        torch.testing.assert_close(result(fit, i), best_of_rank(dense(f), rank), **FP32)
    assert fit.numbers == sum(min(rank, rho) * (20 + 14) for rho in [3, 5, 2, 5])


def test_the_activation_weighted_svd_is_the_best_in_the_output_error() -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(200, 14, generator=draw).double() * torch.logspace(0, -1.5, 14).double()
    c = x.T @ x / 200
    fit = svd_each(MIXED, 2, second_moment=c)
    root = torch.linalg.cholesky(c + 1e-3 * c.diagonal().mean() * torch.eye(14))  # the metric's ridge
    for i, f in enumerate(MIXED[:4]):
        error = ((result(fit, i) - dense(f)) @ root).square().sum()
        tail = torch.linalg.svdvals(dense(f) @ root)[2:].square().sum()
        torch.testing.assert_close(error, tail, rtol=1e-5, atol=1e-8)  # fp32 factors
    assert fit.numbers == 4 * 2 * (20 + 14)


def test_with_gradients_the_svd_is_the_best_in_the_loss_weighted_error() -> None:
    draw = torch.Generator().manual_seed(2)
    x, y = (torch.randn(200, d, generator=draw).double() * torch.logspace(0, -1.5, d).double() for d in (14, 20))
    c, g = x.T @ x / 200, y.T @ y / 200
    fit = svd_each(MIXED, 2, second_moment=c, gradients=g)
    roots = [torch.linalg.cholesky(m + 1e-3 * m.diagonal().mean() * torch.eye(len(m))) for m in (g, c)]
    for i, f in enumerate(MIXED[:4]):
        error = (roots[0].T @ (result(fit, i) - dense(f)) @ roots[1]).square().sum()
        tail = torch.linalg.svdvals(roots[0].T @ dense(f) @ roots[1])[2:].square().sum()
        torch.testing.assert_close(error, tail, rtol=1e-5, atol=1e-8)  # fp32 factors


def test_white_inputs_give_the_plain_svd() -> None:
    plain, weighted = svd_each(MIXED, 2), svd_each(MIXED, 2, second_moment=3 * torch.eye(14))
    for i in range(4):
        torch.testing.assert_close(result(plain, i), result(weighted, i), **FP32)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 14), (9, 40)])  # a stack of 15 rows: narrower and wider than it
def test_factor_pca_projects_each_side_on_its_principal_directions(d_out: int, d_in: int) -> None:
    factors = random_factors(4, d_out, d_in, [3, 5, 2, 5])
    fit = factor_pca(factors, 6)
    left = torch.linalg.svd(torch.cat([f.b for f in factors], 1).double()).U[:, :6]
    right = torch.linalg.svd(torch.cat([f.a for f in factors]).double()).Vh[:6].T
    for i, f in enumerate(factors):
        torch.testing.assert_close(result(fit, i), left @ left.T @ dense(f) @ right @ right.T, **FP32)
    assert fit.numbers == 6 * (d_out + d_in) + 2 * 6 * 15


def test_factor_pca_changes_with_the_factors_a_product_is_written_in() -> None:
    factors = random_factors(3, 20, 14, 4)
    louder = [Factors(factors[0].b * 100, factors[0].a / 100), *factors[1:]]
    a, b = factor_pca(factors, 4), factor_pca(louder, 4)
    assert float((result(a, 1) - result(b, 1)).norm()) > 0.1 * float(dense(factors[1]).norm())


def test_the_average_is_that_of_the_adapters_present() -> None:
    mean = torch.stack([dense(f) for f in MIXED[:4]]).mean(0)
    whole, cut = average(MIXED), average(MIXED, 3)
    for i in range(4):
        torch.testing.assert_close(result(whole, i), mean, **FP32)
        torch.testing.assert_close(result(cut, i), best_of_rank(mean, 3), **FP32)
    assert whole.factors[4] is None
    assert whole.numbers == 20 * 14 and cut.numbers == 3 * (20 + 14)


def ties_loop(matrices: list[Tensor], keep: float) -> Tensor:
    """Entry by entry."""
    trimmed = []
    for w in matrices:
        magnitudes = sorted((abs(float(x)) for x in w.flatten()), reverse=True)
        least = magnitudes[int(keep * len(magnitudes))]  # the authors' kthvalue keeps one more than the share
        trimmed.append([[float(x) if abs(float(x)) >= least else 0.0 for x in row] for row in w])
    out = torch.zeros_like(matrices[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = [t[i][j] for t in trimmed]
            agreeing = [x for x in entries if x * sum(entries) > 0]
            out[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_ties_equals_the_loop_over_entries(keep: float) -> None:
    merged = ties_loop([(f.b @ f.a).double() for f in MIXED[:4]], keep)
    whole, cut = ties(MIXED, keep=keep), ties(MIXED, 2, keep=keep)
    for i in range(4):
        torch.testing.assert_close(result(whole, i), merged, **FP32)
        torch.testing.assert_close(result(cut, i), best_of_rank(merged, 2), **FP32)
    assert whole.factors[4] is None
    assert whole.numbers == 20 * 14 and cut.numbers == 2 * (20 + 14)


def test_ties_of_one_adapter_keeps_all_of_it_when_asked_to() -> None:
    (one,) = random_factors(1, 20, 14, 3)
    torch.testing.assert_close(result(ties([one], keep=1.0), 0), dense(one), **FP32)


def published_loop(matrices: list[Tensor], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten alternations with exact dense SVDs from the same start."""
    draw = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(d, rank, generator=draw)).Q.double() for d in matrices[0].shape)
    for _ in range(10):
        u = torch.linalg.svd(torch.cat([w @ v for w in matrices], 1)).U[:, :rank]
        v = torch.linalg.svd(torch.cat([w.T @ u for w in matrices], 1)).U[:, :rank]
    return u, v


@pytest.mark.parametrize("unit_norm", [True, False])
def test_the_published_jd_equals_ten_dense_alternations(unit_norm: bool) -> None:
    factors = [Factors(f.b * 3.0**i, f.a) for i, f in enumerate(random_factors(4, 12, 10, [3, 5, 2, 5]))]
    matrices = [dense(f) for f in factors]
    u, v = published_loop(unit(matrices) if unit_norm else matrices, 3, seed=5)
    fit = jd_published(factors, 3, seed=5, unit_norm=unit_norm)
    for i, w in enumerate(matrices):
        # The randomised SVD with two spare columns and two power steps is inexact, as published.
        assert float((result(fit, i) - u @ u.T @ w @ v @ v.T).norm()) < 0.02 * float(w.norm())
    assert fit.numbers == 3 * (12 + 10) + 4 * 9


def test_the_published_jd_captures_no_more_than_the_optimum_and_nearly_as_much() -> None:
    factors = random_factors(6, 20, 14, 4)
    fit = jd_published(factors, 5)
    lost = sum(
        float((result(fit, i) - dense(f)).square().sum() / dense(f).square().sum()) for i, f in enumerate(factors)
    )
    best = 6 - hooi(unit([dense(f) for f in factors]), 5)[2]
    assert best - 1e-6 <= lost < 1.1 * best


def test_labels_give_each_cluster_bases_of_its_own() -> None:
    present = random_factors(4, 20, 14, 3)
    factors = [*present, None, Factors(torch.zeros(20, 3), torch.zeros(3, 14))]
    labels = torch.tensor([0, 2, 0, 2, 1, 2])
    fit = jd_published(factors, 6, labels=labels, seed=1)
    for i in range(4):  # two adapters of rank 3 fit in a basis of rank 6
        torch.testing.assert_close(result(fit, i), dense(present[i]), rtol=1e-4, atol=1e-3)  # fp32 alternations
    assert fit.factors[4] is None and not result(fit, 5).any()
    assert fit.numbers == 2 * 6 * (20 + 14) + 4 * 36


def test_the_papers_clusters_find_families_of_similar_adapters_of_any_norm() -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]
    slices = []
    for m in range(3):
        heads, noise = random_factors(3, 40, 30, 4, seed=m), random_factors(10, 40, 30, 4, seed=10 + m)
        family = [heads[k] for k in labels]
        slices.append(
            [Factors(10.0 ** (i % 3) * (f.b + 0.2 * noise[i].b), f.a + 0.2 * noise[i].a) for i, f in enumerate(family)]
        )
    seen: list[tuple[int, int]] = []
    found = published_labels(slices, 4, 3, report=lambda done, most: seen.append((done, most)))
    assert len({(planted, int(k)) for planted, k in zip(labels, found, strict=True)}) == len(set(found.tolist())) == 3
    assert seen[0] == (1, 11) and len(seen) <= 11


def test_adapters_in_the_wrong_cluster_move_to_the_one_that_rebuilds_them_best(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    slices = [family_factors(labels, 40, 4, 0.05, seed=m) for m in range(2)]
    wrong = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0])
    monkeypatch.setattr(published, "_k_means", lambda points, clusters, seed: wrong)
    assert published_labels(slices, 4, 3).tolist() == labels


def test_k_means_finds_separate_points_and_names_no_cluster_twice() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    points = 5 * torch.eye(3, 8)[labels] + torch.randn(30, 8, generator=draw)
    found = published._k_means(points, 3, 0)
    assert torch.equal(found[:, None] == found, labels[:, None] == labels)


def test_the_papers_clusters_are_the_same_for_the_same_seed_whatever_was_drawn_before() -> None:
    slices = [random_factors(8, 20, 14, 4, seed=m) for m in range(2)]
    first = published_labels(slices, 3, 3, seed=2)
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    assert torch.equal(published_labels(slices, 3, 3, seed=2), first)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("n", "clusters"), [(10, 3), (8, 8), (5, 1)])
def test_random_clusters_are_balanced_and_drawn_by_seed(n: int, clusters: int) -> None:
    labels = random_labels(n, clusters, 0)
    sizes = labels.bincount(minlength=clusters)
    assert int(sizes.max()) - int(sizes.min()) <= 1
    assert torch.equal(labels, random_labels(n, clusters, 0))
    if 1 < clusters < n:
        assert any(not torch.equal(labels, random_labels(n, clusters, seed)) for seed in range(1, 4))


def test_random_clusters_hold_the_best_fit_of_their_members() -> None:
    factors = random_factors(6, 20, 14, 4)
    labels = random_labels(7, 3, 1)
    fit = random_assignment([*factors, None], 3, 3, 1)
    for k in range(3):
        own = [i for i in range(6) if labels[i] == k]
        lost = sum(
            float((result(fit, i) - dense(factors[i])).square().sum() / dense(factors[i]).square().sum()) for i in own
        )
        best = len(own) - hooi(unit([dense(factors[i]) for i in own]), 3)[2]
        assert lost == pytest.approx(best, rel=5e-3)  # fit_full stops at small gains
    assert fit.numbers == 3 * 3 * (20 + 14) + 6 * 9


@pytest.mark.parametrize("make", [svd_each, factor_pca, average, ties, jd_published])
def test_a_rank_below_one_is_refused(make: object) -> None:
    with pytest.raises(JDLoRAError, match="at least 1"):
        make(MIXED, 0)  # type: ignore[operator]


def test_a_share_to_keep_outside_its_range_is_refused() -> None:
    with pytest.raises(JDLoRAError, match="share of entries"):
        ties(MIXED, keep=0.0)


@pytest.mark.parametrize("make", [svd_each, factor_pca, average, ties, jd_published])
def test_a_slice_without_any_adapter_stores_nothing(make: object) -> None:
    assert make([None, None], 2) == BaselineFit([None, None], 0)  # type: ignore[operator]
