"""JD-Full keeps the identities and bounds of the paper and of Tucker-2, against dense fp64 references."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.jd.dense import dense, hooi, random_factors, unit
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import FullFit, _start, _sweep, fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem

# The iteration stops when two sweeps lower the remaining error by less than 1e-5 of it each; with linear convergence
# what is still to come is of the order of a few hundred such steps at worst.
CONVERGED = 2e-3


def fit(factors: list[Factors], rank: int, **options: object) -> FullFit:
    return fit_full(SliceProblem.from_factors(factors, "s"), rank, max_sweeps=200, **options)  # type: ignore[arg-type]


def errors(factors: list[Factors], found: FullFit) -> Tensor:
    """Relative squared errors [n], dense; for factors of equal rank, so that members are in order."""
    u, v = found.u.double(), found.v.double()
    parts = [
        (dense(f) - u @ s.double() @ v).square().sum() / dense(f).square().sum()
        for f, s in zip(factors, found.sigma, strict=True)
    ]
    return torch.stack(parts)


def test_a_rank_that_holds_the_stack_is_lossless() -> None:  # §7.1
    factors = random_factors(3, 40, 30, 3)
    assert float(errors(factors, fit(factors, 9)).max()) < 1e-20  # (1e-10)², fp64 rounding squared


def test_one_adapter_gives_its_truncated_svd() -> None:  # §7.2
    factors = random_factors(1, 40, 30, 8)
    tail = torch.linalg.svdvals(dense(factors[0]))[3:].square().sum() / dense(factors[0]).square().sum()
    # Both are fp64; eigenvalues of a Gram matrix carry half the digits.
    torch.testing.assert_close(errors(factors, fit(factors, 3))[0], tail, rtol=1e-7, atol=0)


def test_adapters_in_one_common_subspace_are_lossless_at_their_rank() -> None:  # §7.3
    (common,) = random_factors(1, 40, 30, 4)
    draw = torch.Generator().manual_seed(5)
    factors = [Factors(common.b @ torch.randn(4, 4, generator=draw), common.a) for _ in range(6)]
    # The factors were rounded to fp32 after mixing, so the common space is exact to 6e-8 only.
    assert float(errors(factors, fit(factors, 4)).max()) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_captured_energy_never_falls_from_sweep_to_sweep(rank: int) -> None:  # §7.4
    captured = fit(random_factors(6, 40, 30, 4), rank).captured
    assert all(after >= before for before, after in pairwise(captured))


def test_error_and_scalings_share_the_squared_norm() -> None:  # §7.5
    factors = random_factors(6, 40, 30, 4)
    found = fit(factors, 6)
    norms = torch.stack([dense(f).square().sum() for f in factors])
    kept = found.sigma.flatten(1).square().sum(1) / norms
    torch.testing.assert_close(errors(factors, found) + kept, torch.ones(6).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_the_error_lies_between_the_tucker_bounds(rank: int) -> None:  # §6.3
    factors = random_factors(6, 40, 30, 4)
    matrices = unit([dense(f) for f in factors])
    tails = [
        float(torch.linalg.eigvalsh(gram).flip(0)[rank:].sum())
        for gram in (sum(w @ w.T for w in matrices), sum(w.T @ w for w in matrices))
    ]
    error = float(errors(factors, fit(factors, rank)).sum())
    rounding = 1e-9  # the two sides are sums of fp64 eigenvalues of size 1
    assert max(tails) - rounding <= error <= sum(tails) + rounding


@pytest.mark.parametrize("rank", [1, 2])
def test_captured_energy_keeps_the_papers_theorem_1(rank: int) -> None:  # §7.7
    factors = random_factors(8, 40, 30, 4)
    matrices = torch.stack(unit([dense(f) for f in factors]))
    captured = fit(factors, rank).captured[-1]
    joint = torch.linalg.svdvals(matrices.flatten(1)).square()
    mean = torch.linalg.svdvals(matrices.sum(0)).square()
    assert float(mean[:rank].sum()) / 8 <= captured <= float(joint[: rank * rank].sum())


def test_orthogonal_adapters_lose_at_least_what_corollary_1_says() -> None:  # §7.8
    n, rank, size = 8, 2, 3
    factors = []
    for i, source in enumerate(random_factors(n, size, size, 3)):
        b, a = torch.zeros(n * size, 3), torch.zeros(3, n * size)
        b[i * size : (i + 1) * size], a[:, i * size : (i + 1) * size] = source.b, source.a
        factors.append(Factors(b, a))
    assert float(errors(factors, fit(factors, rank)).mean()) >= 1 - rank**2 / n


def test_no_adapter_does_better_than_its_own_truncated_svd() -> None:  # §7.9
    factors = random_factors(6, 40, 30, 6)
    floors = torch.stack([torch.linalg.svdvals(dense(f))[3:].square().sum() / dense(f).square().sum() for f in factors])
    assert bool((errors(factors, fit(factors, 3)) >= floors - 1e-12).all())


@pytest.mark.parametrize(
    ("n", "d_out", "d_in", "ranks", "rank"),
    [
        (4, 60, 50, 3, 5),  # core on both sides
        (4, 20, 50, 3, 5),  # core on the input side only
        (12, 20, 30, 4, 6),  # no core
        (40, 260, 30, 8, 6),  # range finder instead of a dense eigensolver on the output side
        (5, 60, 50, (2, 4, 3, 2, 5), 5),  # different ranks
    ],
)
def test_the_fit_is_as_good_as_a_dense_solver(
    n: int, d_out: int, d_in: int, ranks: int | tuple[int, ...], rank: int
) -> None:
    factors = random_factors(n, d_out, d_in, ranks)
    _, _, best = hooi(unit([dense(f) for f in factors]), rank, iterations=60)
    captured = fit(factors, rank).captured[-1]
    assert n - captured <= (1 + CONVERGED) * (n - best)


def test_the_core_problem_is_the_problem_itself() -> None:  # §7.12
    small = random_factors(6, 12, 10, 3)  # P = 18 rows: no reduction at these sizes
    draw = torch.Generator().manual_seed(7)
    left, right = (torch.linalg.qr(torch.randn(120, d, generator=draw).double()).Q for d in (12, 10))
    large = [Factors(left @ f.b.double(), f.a.double() @ right.T) for f in small]
    a, b = fit(small, 4), fit(large, 4)
    torch.testing.assert_close(a.captured[-1], b.captured[-1], rtol=1e-10, atol=0)  # fp64, same iterates
    torch.testing.assert_close(left @ a.u @ a.sigma @ a.v @ right.T, b.u @ b.sigma @ b.v, rtol=0, atol=1e-7)


def approximations(factors: list[Factors], rank: int) -> Tensor:
    found = fit(factors, rank)
    order = SliceProblem.from_factors(factors, "s").members.argsort()
    return (found.u @ found.sigma @ found.v)[order]


def test_the_approximation_does_not_depend_on_the_order_of_adapters() -> None:  # §7.14
    factors = random_factors(6, 40, 30, 4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = approximations([factors[i] for i in order], 5)
    # Same iterates up to fp64 rounding, amplified by gaps between eigenvalues.
    torch.testing.assert_close(shuffled, approximations(factors, 5)[order], rtol=0, atol=1e-8)


def test_the_approximation_depends_on_the_product_of_the_factors_only() -> None:  # §7.14
    factors = random_factors(6, 40, 30, 4)
    draw = torch.Generator().manual_seed(3)
    mixed = []
    for f in factors:
        g = torch.randn(4, 4, generator=draw).double()
        mixed.append(Factors(1e3 * f.b.double() @ g, 1e-3 * torch.linalg.inv(g) @ f.a.double()))
    torch.testing.assert_close(approximations(mixed, 5), approximations(factors, 5), rtol=0, atol=1e-8)


def test_an_adapters_norm_scales_its_own_scaling_and_nothing_else() -> None:  # §7.14
    factors = random_factors(6, 40, 30, 4)
    louder = [Factors(f.b * 2.0 ** (4 * i), f.a) for i, f in enumerate(factors)]
    a, b = fit(factors, 5), fit(louder, 5)
    torch.testing.assert_close(a.u, b.u, rtol=0, atol=1e-9)
    factor = (2.0 ** (4 * torch.arange(6))).double()[:, None, None]
    torch.testing.assert_close(a.sigma * factor, b.sigma, rtol=1e-7, atol=1e-7)


def test_the_gauge_is_all_orthogonal_descending_and_positive() -> None:  # §6.5
    factors = random_factors(6, 40, 30, 4)
    found = fit(factors, 6)
    norms = torch.stack([dense(f).norm() for f in factors])
    sigma = found.sigma / norms[:, None, None]
    for gram in (sum(s @ s.T for s in sigma), sum(s.T @ s for s in sigma)):
        energies = gram.diagonal()
        torch.testing.assert_close(gram, torch.diag(energies), rtol=0, atol=1e-12)
        assert bool((energies[:-1] >= energies[1:]).all())
    for basis in (found.u, found.v.T):
        torch.testing.assert_close(basis.T @ basis, torch.eye(6).double(), rtol=0, atol=1e-12)
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_leading_blocks_are_good_fits_of_lower_rank() -> None:  # §6.5
    factors = random_factors(6, 40, 30, 4)
    high = fit(factors, 10)
    norms = torch.stack([dense(f).norm() for f in factors])
    block = float((high.sigma[:, :6, :6] / norms[:, None, None]).square().sum())
    # Near-optimal, not optimal; a basis in an arbitrary rotation would keep about (6/10)² of it.
    assert block >= 0.85 * fit(factors, 6).captured[-1]


def test_the_error_does_not_rise_with_the_rank() -> None:  # §7.15
    factors = random_factors(6, 40, 30, 4)
    captured = [fit(factors, rank).captured[-1] for rank in range(1, 26)]
    assert all(after >= before - 1e-9 for before, after in pairwise(captured))


def test_a_zero_row_and_column_pair_changes_nothing() -> None:  # §7.17
    factors = random_factors(5, 40, 30, 3)
    padded = [
        Factors(torch.cat([f.b, torch.zeros(40, i)], 1), torch.cat([f.a, torch.zeros(i, 30)]))
        for i, f in enumerate(factors)
    ]
    torch.testing.assert_close(approximations(padded, 4), approximations(factors, 4), rtol=0, atol=1e-9)


def test_the_identity_of_size_two_converges_at_rank_one() -> None:  # §7.18: updating both sides at once cycles
    found = fit([Factors(torch.eye(2), torch.eye(2))], 1)
    assert abs(found.captured[-1] - 0.5) < 1e-12  # one of two equal singular values


def test_one_sweep_escapes_a_start_that_makes_simultaneous_updates_cycle() -> None:  # §7.18
    problem = SliceProblem.from_factors([Factors(torch.eye(2), torch.eye(2))], "s")
    u, v = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[math.cos(1.56)], [math.sin(1.56)]]).double()
    # Updating both from the old pair would swap u and v for ever at 0.5 · cos²(1.56) = 6e-5.
    assert abs(_sweep(problem, _start(problem, u, v)).captured[-1] - 0.5) < 1e-12


def test_a_warm_start_in_a_better_valley_than_the_hosvd_wins() -> None:
    factors = random_factors(6, 40, 30, 4, seed=1)
    matrices = unit([dense(f) for f in factors])
    draws = [torch.Generator().manual_seed(seed) for seed in range(12)]
    u, v, best = max(
        (hooi(matrices, 1, 60, torch.randn(30, 1, generator=d).double()) for d in draws), key=lambda x: x[2]
    )
    assert fit(factors, 1).captured[-1] < 0.9 * best  # what makes this example one
    assert fit(factors, 1, start=(u, v.T)).captured[-1] >= best - 1e-10  # fp64 sums of 6 terms of size 1


@pytest.mark.parametrize("rank", [1, 4])
def test_a_warm_start_is_never_made_worse(rank: int) -> None:
    factors = random_factors(6, 40, 30, 4)
    u, v, best = hooi(unit([dense(f) for f in factors]), rank)
    found = fit(factors, rank, start=(u, v.T))
    assert found.captured[-1] >= best - 1e-10  # fp64 sums of 6 terms of size 1


def test_rank_beyond_the_stack_is_padded_with_zeros_and_reported() -> None:
    factors = random_factors(2, 40, 5, 2)
    found = fit([factors[0], factors[0], factors[1]], 12)
    assert (found.rank_out, found.rank_in) == (4, 4)
    assert found.u.shape == (40, 12) and found.v.shape == (12, 5) and found.sigma.shape == (3, 12, 12)
    assert not found.u[:, 4:].any() and not found.v[4:].any()
    assert not found.sigma[:, 4:].any() and not found.sigma[:, :, 4:].any()
    assert float(errors([factors[0], factors[0], factors[1]], found).max()) < 1e-20


def test_the_same_problem_gives_the_same_bits() -> None:
    factors = random_factors(40, 300, 280, 8)
    a, b = fit(factors, 6), fit(factors, 6)
    assert torch.equal(a.u, b.u) and torch.equal(a.v, b.v) and torch.equal(a.sigma, b.sigma)


def test_no_adapters_give_zero_bases() -> None:
    found = fit([Factors(torch.zeros(12, 2), torch.zeros(2, 10))], 3)
    assert found.u.shape == (12, 3) and found.v.shape == (3, 10) and not found.u.any() and not found.v.any()


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(JDLoRAError, match="rank 0"):
        fit(random_factors(2, 12, 10, 2), 0)
