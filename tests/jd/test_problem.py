"""Inner products and products in factored form equal the dense ones."""

from __future__ import annotations

import pytest
import torch

from tests.jd.dense import dense, random_factors
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem, squared_error, squared_norm

# Both sides are fp64 sums of a few thousand products: 1e-12 is a hundred times their rounding.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def test_the_squared_norm_of_factors_is_that_of_the_dense_product() -> None:
    (factors,) = random_factors(1, 30, 20, 4)
    torch.testing.assert_close(squared_norm(factors.b, factors.a), dense(factors).square().sum(), **EXACT)


def test_the_squared_error_is_dense_even_when_the_bases_are_not_orthonormal() -> None:
    (factors,) = random_factors(1, 30, 20, 4)
    draw = torch.Generator().manual_seed(1)
    u, sigma, v = (torch.randn(*s, generator=draw) for s in ((30, 6), (6, 6), (6, 20)))
    expected = (dense(factors) - u.double() @ sigma.double() @ v.double()).square().sum()
    torch.testing.assert_close(squared_error(factors.b, factors.a, u, sigma, v), expected, **EXACT)


def test_the_squared_error_of_an_exact_decomposition_is_rounding_and_never_negative() -> None:
    for seed in range(10):  # the rounding has either sign
        (factors,) = random_factors(1, 300, 200, 8, seed=seed)
        error = squared_error(factors.b, factors.a, factors.b, torch.eye(8), factors.a)
        mixed = squared_error(factors.b, factors.a, factors.b / 3, 3 * torch.eye(8), factors.a)
        # Three fp64 terms of size ‖ΔW‖² cancel; dividing by 3 rounds b by another 6e-8 (3.6e-15 squared).
        assert 0 <= float(error) <= 1e-13 * float(squared_norm(factors.b, factors.a))
        assert 0 <= float(mixed) <= 1e-13 * float(squared_norm(factors.b, factors.a))


def test_products_with_adapters_of_mixed_ranks_equal_dense_loops() -> None:
    factors = random_factors(5, 30, 20, [4, 2, 7, 2, 4])
    problem = SliceProblem.from_factors(factors, "s")
    matrices = [dense(factors[i]) for i in problem.members.tolist()]
    weights = [1 / float(w.square().sum()) for w in matrices]
    draw = torch.Generator().manual_seed(1)
    u, v = torch.randn(30, 3, generator=draw).double(), torch.randn(20, 5, generator=draw).double()
    z, t = problem.times(u, v)
    scale = problem.scale[:, None, None]
    torch.testing.assert_close(problem.sigmas(z, t) * scale, torch.stack([u.T @ w @ v for w in matrices]), **EXACT)
    energies = torch.stack([x * (u.T @ w @ v).square().sum() for w, x in zip(matrices, weights, strict=True)])
    torch.testing.assert_close(problem.energies(z, t), energies, **EXACT)
    for result, step in (
        (problem.gram_step_out(z, t), lambda w: w @ v @ v.T @ w.T @ u),
        (problem.gram_step_in(z, t), lambda w: w.T @ u @ u.T @ w @ v),
        (problem.full_gram_out(u), lambda w: w @ w.T @ u),
        (problem.full_gram_in(v), lambda w: w.T @ w @ v),
    ):
        expected = sum(x * step(w) for w, x in zip(matrices, weights, strict=True))
        torch.testing.assert_close(result, expected, **EXACT)


def test_energies_of_several_bases_at_once_equal_those_of_each() -> None:
    problem = SliceProblem.from_factors(random_factors(4, 30, 20, [3, 5, 3, 2]), "s")
    draw = torch.Generator().manual_seed(1)
    us, vs = torch.randn(3, 30, 2, generator=draw).double(), torch.randn(3, 20, 2, generator=draw).double()
    z, t = problem.times(torch.cat(list(us), 1), torch.cat(list(vs), 1))
    expected = torch.stack([problem.energies(*problem.times(u, v)) for u, v in zip(us, vs, strict=True)], 1)
    torch.testing.assert_close(problem.energies_by_block(z, t, 2), expected, **EXACT)


def test_a_subset_keeps_each_members_factors_weights_and_place() -> None:
    factors = random_factors(5, 12, 10, [4, 2, 3, 2, 4])
    problem = SliceProblem.from_factors(factors, "s")
    part = problem.subset(torch.tensor([1, 2, 4]))
    assert part.members.tolist() == problem.members[[1, 2, 4]].tolist()
    for j, member in enumerate(part.members.tolist()):
        rows = slice(part.offsets[j], part.offsets[j + 1])
        torch.testing.assert_close(part.scale[j] * part.bt[rows].T @ part.a[rows], dense(factors[member]), **EXACT)
    torch.testing.assert_close(part.squared_norms, problem.squared_norms[[1, 2, 4]], **EXACT)


def test_adapters_absent_or_zero_in_the_slice_are_left_out() -> None:
    one, two, three = random_factors(3, 12, 10, 2)
    zero_product = Factors(torch.eye(12)[:, :2], torch.zeros(2, 10))
    crossing = Factors(torch.tensor([[1.0, 1.0]] * 12), torch.tensor([[1.0] * 10, [-1.0] * 10]))  # b a = 0
    problem = SliceProblem.from_factors([None, one, zero_product, two, crossing, three], "s")
    assert problem.members.tolist() == [1, 3, 5]


@pytest.mark.parametrize(("scale_b", "scale_a"), [(1e-30, 1e30), (1e-25, 1e-15), (1e15, 1e20)])
def test_extreme_scales_neither_overflow_nor_underflow(scale_b: float, scale_a: float) -> None:
    (plain,) = random_factors(1, 12, 10, 3)
    scaled = Factors(plain.b * scale_b, plain.a * scale_a)
    problem = SliceProblem.from_factors([scaled], "s")
    assert float(problem.bt.abs().max()) < 10
    # fp32 products of the test's own scaling round by 6e-8.
    expected = squared_norm(plain.b, plain.a) * (scale_b * scale_a) ** 2
    torch.testing.assert_close(problem.squared_norms[0], expected, rtol=1e-6, atol=0)


def test_a_slice_in_which_no_adapter_has_anything_is_refused_by_name() -> None:
    with pytest.raises(JDLoRAError, match=r"q_proj: no adapter has factors"):
        SliceProblem.from_factors([None, None], "q_proj")


def test_factors_of_different_base_models_are_refused() -> None:
    with pytest.raises(JDLoRAError, match=r"q_proj: adapter 1 is \[14, 10\], others are \[12, 10\]"):
        SliceProblem.from_factors([*random_factors(1, 12, 10, 2), *random_factors(1, 14, 10, 2)], "q_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    (factors,) = random_factors(1, 12, 10, 2)
    factors.a[1, 3] = bad
    with pytest.raises(JDLoRAError, match=r"q_proj: adapter 0 .*not finite"):
        SliceProblem.from_factors([factors], "q_proj")


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(JDLoRAError, match="do not multiply"):
        Factors(torch.zeros(12, 3), torch.zeros(2, 10))


def test_an_importance_of_three_counts_like_three_copies() -> None:
    factors = random_factors(4, 30, 20, 3)
    problem = SliceProblem.from_factors(factors, "s")
    energies = problem.squared_norms / torch.tensor([1.0, 3.0, 1.0, 2.0], dtype=torch.float64)
    weighted = problem.in_shares_of(energies)
    copies = SliceProblem.from_factors([factors[i] for i in (0, 1, 1, 1, 2, 3, 3)], "s")
    torch.testing.assert_close(weighted.squared_norms, problem.squared_norms)
    assert weighted.total == pytest.approx(7)
    one, other = (fit_full(each, 4, max_sweeps=100).captured[-1] for each in (weighted, copies))
    assert one == pytest.approx(other, rel=1e-6)
    again = weighted.in_shares_of(energies)  # not twice
    torch.testing.assert_close(again.weights, weighted.weights)
    without = problem.in_shares_of(torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(without.weights, problem.weights)
