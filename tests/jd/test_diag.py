"""JD-Diag against dense fp64 references: planted forms are found, the objective is true and never rises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.jd.dense import dense, random_factors, unit
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.diag import DiagFit, captured_diag, fit_diag, refit_diag
from vllm_jdlora.jd.diag_starts import simultaneous
from vllm_jdlora.jd.diag_sweeps import Rows, begin
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem


def problem_of(factors: list[Factors] | list[Factors | None]) -> SliceProblem:
    return SliceProblem.from_factors(factors, "s")


def planted(n: int, d_out: int, d_in: int, terms: int, rho: int, seed: int = 0) -> list[Factors]:
    """n adapters, each of `rho` of the common rank-one terms u_j v_j with coefficients of its own."""
    draw = torch.Generator().manual_seed(seed)
    u, v = torch.randn(d_out, terms, generator=draw), torch.randn(terms, d_in, generator=draw)
    out = []
    for _ in range(n):
        chosen = torch.randperm(terms, generator=draw)[:rho]
        out.append(Factors(u[:, chosen] * torch.randn(rho, generator=draw), v[chosen]))
    return out


def errors(factors: list[Factors], problem: SliceProblem, fit: DiagFit) -> Tensor:
    """Relative squared errors [m] in member order, dense."""
    u, v = fit.u.double(), fit.v.double()
    parts = []
    for j, member in enumerate(problem.members.tolist()):
        w = dense(factors[member])
        parts.append((w - u @ fit.sigma[j].double().diag() @ v).square().sum() / w.square().sum())
    return torch.stack(parts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("terms", "rho"), [(6, 6), (6, 3), (10, 4)])
def test_a_planted_diagonal_form_is_found(terms: int, rho: int, seed: int) -> None:
    factors = planted(12, 40, 30, terms, rho, seed)
    problem = problem_of(factors)
    fit = fit_diag(problem, terms)
    # Factors were rounded to fp32 after mixing (1e-14 squared); ALS stops at small gains below 1e-6 of the energy.
    assert float(errors(factors, problem, fit).max()) < 1e-6


def test_a_planted_form_is_found_term_by_term() -> None:
    factors = planted(12, 40, 30, 5, 5)
    draw = torch.Generator().manual_seed(0)
    u = torch.nn.functional.normalize(torch.randn(40, 5, generator=draw).double(), dim=0)
    fit = fit_diag(problem_of(factors), 5)
    # CP is unique: every planted column is a column of u, up to sign, as far as ALS went.
    assert float((u.T @ fit.u.double()).abs().max(1).values.min()) > 1 - 1e-4


def test_simultaneous_diagonalisation_alone_gives_an_exact_form() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(size, 6, generator=draw).double() for size in (6, 6, 9))
    left, right = torch.einsum("pr,mr->mrp", a, c).flatten(0, 1), b.T.repeat(9, 1)
    energy = float(torch.einsum("pr,qr,mr->mpq", a, b, c).square().sum())
    rows = Rows(left, right, left.new_ones(54, 1), torch.arange(9).repeat_interleave(6), 9, energy)
    # Eigenvectors in fp64, times the conditioning of A and of their pencil.
    assert begin(rows, *simultaneous(rows, 6)).objective[-1] < 1e-12 * energy


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_the_objective_is_the_dense_error_and_never_rises(rank: int) -> None:
    factors = random_factors(6, 40, 30, [4, 2, 3, 4, 5, 2])
    problem = problem_of(factors)
    fit = fit_diag(problem, rank)
    assert len(fit.objective) > 1 and all(after <= before for before, after in pairwise(fit.objective))
    # fp64 differences of terms up to 6.
    assert float(errors(factors, problem, fit).sum()) == pytest.approx(fit.objective[-1], abs=1e-9)


def test_no_diagonal_scaling_is_better_on_the_bases_found() -> None:
    factors = random_factors(4, 30, 20, 3)
    problem = problem_of(factors)
    fit = fit_diag(problem, 5)
    design = torch.stack([torch.outer(fit.u[:, j], fit.v[j]).flatten() for j in range(5)], 1).double()
    for j, w in enumerate(map(dense, factors)):
        best = torch.linalg.lstsq(design, w.flatten()[:, None]).solution[:, 0]
        # The last update's guard leaves 1e-6 of its step.
        torch.testing.assert_close(fit.sigma[j], best, rtol=1e-4, atol=1e-4 * float(best.abs().max()))


def test_dense_updates_of_either_basis_gain_nothing_at_convergence() -> None:
    factors = random_factors(5, 12, 10, 3)
    problem = problem_of(factors)
    fit = fit_diag(problem, 4, max_sweeps=2000)  # the core (32) holds all 12 × 10 dimensions here
    weights = [1 / dense(f).norm() for f in factors]
    blocks = torch.cat([w * dense(f) for w, f in zip(weights, factors, strict=True)], 1)
    mixed = torch.cat([w * s[:, None] * fit.v for w, s in zip(weights, fit.sigma, strict=True)], 1)
    u = torch.linalg.lstsq(mixed.T, blocks.T).solution.T
    # It stops when three sweeps in a row gain less than 1e-5 of the error each.
    assert fit.objective[-1] - float((blocks - u @ mixed).square().sum()) < 1e-4 * fit.objective[-1]


@pytest.mark.parametrize("rank", [2, 5])
def test_one_adapter_gives_its_truncated_svd(rank: int) -> None:
    factors = random_factors(1, 40, 30, 8)
    tail = torch.linalg.svdvals(dense(factors[0]))[rank:].square().sum() / dense(factors[0]).square().sum()
    torch.testing.assert_close(errors(factors, problem_of(factors), fit_diag(problem_of(factors), rank))[0], tail)


def test_it_is_no_worse_than_the_best_ranks_for_an_svd_of_each_adapter() -> None:
    draw = torch.Generator().manual_seed(3)  # adapters that share nothing
    u, v = (torch.linalg.qr(torch.randn(40, 20, generator=draw)).Q for _ in range(2))
    factors = []
    for i in range(4):
        at = slice(5 * i, 5 * i + 5)
        factors.append(Factors(u[:, at] * torch.rand(5, generator=draw), v[:, at].T))
    spectra = [torch.linalg.svdvals(dense(f))[:5].square() for f in factors]
    shares = torch.cat([s / s.sum() for s in spectra]).sort(descending=True).values
    # fp32 factors: their orthogonality is exact to 1e-7 only.
    assert fit_diag(problem_of(factors), 9).objective[-1] <= float(shares[9:].sum()) + 1e-6


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_full_started_from_its_orthonormalised_bases_is_at_least_as_good(rank: int) -> None:  # §7.11
    problem = problem_of(random_factors(6, 40, 30, 4))
    diag = fit_diag(problem, rank)
    start = (torch.linalg.qr(diag.u).Q, torch.linalg.qr(diag.v.T).Q.T)
    full = fit_full(problem, rank, start=start)
    assert len(problem) - full.captured[-1] <= diag.objective[-1] + 1e-12  # fp64


def test_terms_enough_for_every_adapter_are_lossless_and_the_rest_is_zero() -> None:
    factors = random_factors(3, 40, 30, 3)
    problem = problem_of(factors)
    fit = fit_diag(problem, 12)
    assert float(errors(factors, problem, fit).max()) < 1e-15  # fp64, conditioning of nine terms squared
    assert not fit.u[:, 9:].any() and not fit.v[9:].any() and not fit.sigma[:, 9:].any()


def test_columns_have_unit_norm_fixed_signs_and_falling_energy() -> None:
    problem = problem_of(random_factors(6, 40, 30, 4))
    fit = fit_diag(problem, 6)
    for basis in (fit.u, fit.v.T):
        torch.testing.assert_close(basis.norm(dim=0), torch.ones(6).double(), rtol=1e-12, atol=0)  # fp64
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())
    energy = (fit.sigma.square() / problem.squared_norms[:, None]).sum(0)
    assert all(after <= before for before, after in pairwise(energy.tolist()))


def test_the_result_depends_neither_on_gauge_nor_on_scale_nor_on_order() -> None:  # §7.14
    factors = random_factors(5, 40, 30, 4)
    draw = torch.Generator().manual_seed(2)
    order = [3, 0, 4, 1, 2]
    other = []
    for i in order:
        mix = torch.eye(4) + 0.2 * torch.randn(4, 4, generator=draw)
        f = factors[i]
        other.append(Factors((f.b.double() @ mix.double()).float() * 4, (torch.linalg.inv(mix) @ f.a) * 2))
    a, b = fit_diag(problem_of(factors), 5), fit_diag(problem_of(other), 5)
    # Mixing rounds the factors to fp32 (6e-8, times the conditioning of CP).
    torch.testing.assert_close(a.u, b.u, rtol=0, atol=1e-3)
    torch.testing.assert_close(8 * a.sigma[order], b.sigma, rtol=1e-3, atol=1e-2)


def test_the_same_input_gives_the_same_bits() -> None:
    a, b = (fit_diag(problem_of(random_factors(6, 40, 30, 4)), 5) for _ in range(2))
    assert torch.equal(a.u, b.u) and torch.equal(a.v, b.v) and torch.equal(a.sigma, b.sigma)


def test_absent_zero_and_rank_deficient_adapters_do_no_harm() -> None:
    (plain,) = random_factors(1, 40, 30, 4)
    deficient = Factors(plain.b[:, [0, 0, 0, 1]], plain.a)
    zero = Factors(torch.zeros(40, 4), plain.a)
    factors = [None, *random_factors(3, 40, 30, 4, seed=1), zero, deficient]
    problem = problem_of(factors)
    fit = fit_diag(problem, 6)
    assert fit.sigma.shape == (4, 6) and bool(fit.sigma.isfinite().all() and fit.u.isfinite().all())
    alone = fit_diag(problem_of([f for f in factors[1:] if f is not zero and f is not None]), 6)
    assert torch.equal(alone.u, fit.u) and torch.equal(alone.sigma, fit.sigma)


def test_identical_adapters_share_their_terms() -> None:
    (one,) = random_factors(1, 40, 30, 3)
    factors = [one, Factors(-2 * one.b, one.a), one]
    fit = fit_diag(problem_of(factors), 3)
    assert float(errors(factors, problem_of(factors), fit).max()) < 1e-12  # fp32 scaling by two is exact; fp64


def test_no_adapter_at_all_gives_zeros() -> None:
    problem = problem_of([Factors(torch.zeros(12, 2), torch.zeros(2, 10))])
    fit = fit_diag(problem, 3)
    assert fit.sigma.shape == (0, 3) and not fit.u.any() and not fit.v.any() and fit.objective == (0.0,)


def test_a_given_fit_is_the_space_that_the_result_lies_in() -> None:
    problem = problem_of(random_factors(6, 40, 30, 4))
    full = fit_full(problem, 5)
    fit = fit_diag(problem, 4, start=full)
    u, v = full.u, full.v.T
    torch.testing.assert_close(u @ (u.T @ fit.u), fit.u, rtol=0, atol=1e-12)  # fp64
    torch.testing.assert_close(v @ (v.T @ fit.v.T), fit.v.T, rtol=0, atol=1e-12)


def test_the_last_sweeps_gain_from_what_the_core_leaves_out() -> None:
    problem = problem_of(random_factors(12, 60, 50, 6))  # 72 directions, of which the core holds 32
    core = fit_full(problem, 32, max_sweeps=1, range_steps=1)
    inside, outside = fit_diag(problem, 8, start=core), fit_diag(problem, 8)
    assert outside.objective[: len(inside.objective)] == pytest.approx(inside.objective)
    assert outside.objective[-1] < inside.objective[-1] - 1e-3


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(JDLoRAError, match="at least 1"):
        fit_diag(problem_of(random_factors(2, 12, 10, 2)), 0)


@pytest.mark.parametrize("kept", [6, 4])
def test_refitted_scalings_are_the_least_squares_ones_on_cast_bases(kept: int) -> None:
    factors = random_factors(4, 30, 20, [4, 2, 4, 3])
    problem = problem_of(factors)
    draw = torch.Generator().manual_seed(1)
    u, v = torch.randn(30, 6, generator=draw), torch.randn(6, 20, generator=draw)
    u[:, kept:], v[kept:] = 0, 0
    u, v = u.bfloat16(), v.bfloat16()
    sigma, error = refit_diag(problem, u, v)
    assert sigma.dtype == torch.float32 and error.dtype == torch.float64 and not sigma[:, kept:].any()
    design = torch.stack([torch.outer(u[:, j].double(), v[j].double()).flatten() for j in range(kept)], 1)
    for j, member in enumerate(problem.members.tolist()):
        w = dense(factors[member])
        best = torch.linalg.lstsq(design, w.flatten()[:, None]).solution[:, 0]
        torch.testing.assert_close(sigma[j, :kept].double(), best, rtol=1e-5, atol=1e-6)  # fp32
        expected = (w - u.double() @ sigma[j].double().diag() @ v.double()).square().sum()
        torch.testing.assert_close(error[j], expected, rtol=1e-10, atol=1e-12)  # fp64 terms of the size of the norm


def test_refitting_on_the_bases_as_found_gives_the_fit_and_its_error_even_in_a_large_stack() -> None:
    factors = random_factors(600, 16, 12, 7)
    problem = problem_of(factors)
    assert problem.a.dtype == torch.float32 and problem.rows > 4096
    fit = fit_diag(problem, 6, max_sweeps=5)
    sigma, error = refit_diag(problem, fit.u, fit.v)
    torch.testing.assert_close(sigma, fit.sigma, rtol=1e-3, atol=1e-3 * float(sigma.abs().max()))  # fp32 bases
    relative = float((error / problem.squared_norms).sum())
    assert relative == pytest.approx(fit.objective[-1], rel=1e-4)


@pytest.mark.parametrize("each", [1, 2])
def test_columns_for_all_members_side_by_side_lose_no_more_than_the_truncated_svd_of_each(each: int) -> None:
    factors = random_factors(4, 40, 30, [3, 5, 4, 4])
    fit = fit_diag(SliceProblem.from_factors(factors, "s"), 4 * each)
    tails = [torch.linalg.svdvals(w)[each:].square().sum() for w in unit([dense(f) for f in factors])]
    # Strangers: the columns may be shared out by need, and shared, so it is less and never more.
    assert fit.objective[-1] < float(sum(tails)) - 1e-3


def test_energies_of_several_clusters_are_what_refits_of_each_adapter_keep() -> None:
    factors = random_factors(5, 30, 20, [3, 5, 2, 4, 4])
    problem = problem_of(factors).in_shares_of(torch.arange(1.0, 6).double())
    draw = torch.Generator().manual_seed(2)
    u, v = torch.randn(3, 30, 6, generator=draw).double(), torch.randn(3, 6, 20, generator=draw).double()
    u[1, :, 4:], v[1, 4:] = 0, 0
    captured = captured_diag(problem, u, v)
    for k in range(3):
        design = torch.stack([torch.outer(u[k, :, j], v[k, j]).flatten() for j in range(6)], 1)
        projector = design @ torch.linalg.pinv(design)
        for j, member in enumerate(problem.members.tolist()):
            w = dense(factors[member]).flatten()
            share = float((projector @ w).square().sum() / w.square().sum())
            assert float(captured[j, k]) == pytest.approx(share * float(problem.importance[j]), rel=1e-9)  # fp64
