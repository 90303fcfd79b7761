"""Certificates hold on both sides of every joint fit, against dense fp64 spectra."""

from __future__ import annotations

import pytest
import torch

from tests.jd.dense import dense, family_factors, hooi, random_factors, unit
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.certificate import certify, certify_clusters
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem

# Everything is fp64 of a few units of energy; the fp32 factors are the same on both sides.
ROUNDING = 1e-9


def problem_of(factors: list[Factors]) -> SliceProblem:
    return SliceProblem.from_factors(factors, "s")


def reference(factors: list[Factors], rank: int) -> tuple[float, float]:
    """(lower, upper) from dense matrices."""
    ws = unit([dense(f) for f in factors])
    tails = [
        float(torch.linalg.eigvalsh(torch.stack([g(w) for w in ws]).sum(0)).flip(0)[rank:].clamp_min(0).sum())
        for g in (lambda w: w @ w.T, lambda w: w.T @ w)
    ]
    floors = sum(float(torch.linalg.svdvals(w)[rank:].square().sum()) for w in ws)
    flat = torch.stack([w.flatten() for w in ws])
    beyond = float(torch.linalg.svdvals(flat)[rank**2 :].square().sum())
    return max(*tails, floors, beyond), sum(tails)


@pytest.mark.parametrize("rank", [1, 2, 4, 9])
@pytest.mark.parametrize(
    "factors",
    [random_factors(5, 40, 30, 3), random_factors(6, 12, 50, [2, 5, 3, 3, 4, 2]), family_factors([0] * 7, 20, 3, 0.3)],
    ids=["reduced", "mixed ranks, one side full", "a family"],
)
def test_bounds_are_those_of_the_dense_spectra(factors: list[Factors], rank: int) -> None:
    found = certify(problem_of(factors), rank)
    assert found is not None
    lower, upper = reference(factors, rank)
    assert found.lower == pytest.approx(lower, abs=ROUNDING) and found.upper == pytest.approx(upper, abs=ROUNDING)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_fits_and_their_hosvd_lie_between_the_bounds(rank: int) -> None:
    factors = random_factors(6, 40, 30, 4)
    found, fit = certify(problem_of(factors), rank), fit_full(problem_of(factors), rank, max_sweeps=200)
    assert found is not None
    start, end = (6 - captured for captured in (fit.captured[0], fit.captured[-1]))
    optimum = 6 - hooi(unit([dense(f) for f in factors]), rank)[2]
    assert 0 < found.lower <= end + ROUNDING
    assert end <= start <= found.upper + ROUNDING
    assert found.upper <= 2 * optimum + ROUNDING


def test_each_kind_of_lower_bound_can_be_the_one_that_counts() -> None:
    # Σ_i of rank 1 span one dimension: nine adapters in one common 3 × 3 space lose more than tails of rank 2 say.
    alike = family_factors([0] * 9, 30, 3, 0.0, seed=1)
    tails = [float(torch.linalg.eigvalsh(sum(g(w) for w in unit([dense(f) for f in alike]))).flip(0)[1:].sum())
             for g in (lambda w: w @ w.T, lambda w: w.T @ w)]  # fmt: skip
    found = certify(problem_of(alike), 1)
    assert found is not None and found.lower > max(tails) + 0.1
    # One adapter: both tails are its truncated SVD.
    single = random_factors(1, 20, 20, 5)
    found = certify(problem_of(single), 2)
    assert found is not None and found.upper == pytest.approx(2 * found.lower)


def test_clusters_add_up_and_relative_bounds_are_roots_of_means() -> None:
    slices = [family_factors([0, 0, 0, 1, 1], 20, 3, 0.3, seed=m) for m in range(2)]
    labels = torch.tensor([0, 0, 0, 2, 2])
    together = certify_clusters([problem_of(factors) for factors in slices], labels, 2)
    parts = [certify(problem_of(part), 2) for factors in slices for part in (factors[:3], factors[3:])]
    assert together is not None and together.weight == 10
    assert together.lower == pytest.approx(sum(part.lower for part in parts if part))
    assert together.relative[1] == pytest.approx((sum(part.upper for part in parts if part) / 10) ** 0.5)


def test_what_a_dense_solver_cannot_certify_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_jdlora.jd.certificate._LARGEST_CORE", 10)
    problem = problem_of(random_factors(6, 40, 30, 4))
    assert certify(problem, 3) is None
    assert certify_clusters([problem], torch.zeros(6, dtype=torch.int64), 3) is None
    small = problem_of(random_factors(2, 40, 30, 4))
    assert certify(small, 3) is not None
    with pytest.raises(JDLoRAError, match="rank 0"):
        certify(small, 0)


def test_a_slice_without_any_adapter_is_lossless() -> None:
    nothing = problem_of([Factors(torch.zeros(4, 1), torch.zeros(1, 4))])
    found = certify(nothing, 1)
    assert found is not None and found.relative == (0.0, 0.0)
