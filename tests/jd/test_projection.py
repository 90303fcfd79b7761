"""Scalings on given bases are the least-squares ones, and their errors are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.jd.dense import dense, random_factors
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.projection import captured_by_cluster, refit_sigma


def bases(d_out: int, d_in: int, rank: int, kept: int) -> tuple[Tensor, Tensor]:
    """Tilted bases u [d_out, rank], v [rank, d_in] in bf16, zero beyond `kept` directions."""
    draw = torch.Generator().manual_seed(1)
    u, v = torch.randn(d_out, rank, generator=draw), torch.randn(rank, d_in, generator=draw)
    u[:, kept:], v[kept:] = 0, 0
    return u.bfloat16(), v.bfloat16()


@pytest.mark.parametrize("kept", [6, 4])
def test_sigma_is_the_least_squares_solution_on_cast_bases(kept: int) -> None:
    factors = random_factors(3, 30, 20, [4, 2, 4])
    problem = SliceProblem.from_factors(factors, "s")
    u, v = bases(30, 20, 6, kept)
    sigma, error = refit_sigma(problem, u, v)
    assert sigma.dtype == torch.float32 and error.dtype == torch.float64
    design = torch.kron(u.double()[:, :kept], v.double()[:kept].T.contiguous())
    for j, member in enumerate(problem.members.tolist()):
        w = dense(factors[member])
        best = torch.linalg.lstsq(design, w.flatten()[:, None]).solution.view(kept, kept)
        # Σ is stored in fp32: 6e-8 of its largest entry.
        torch.testing.assert_close(sigma[j, :kept, :kept].double(), best, rtol=1e-6, atol=1e-6)
        assert not sigma[j, kept:].any() and not sigma[j, :, kept:].any()
        expected = (w - u.double() @ sigma[j].double() @ v.double()).square().sum()
        # Three fp64 terms of the size of the norm.
        torch.testing.assert_close(error[j], expected, rtol=1e-10, atol=1e-12)


def test_errors_stay_exact_in_a_stack_too_large_for_fp64() -> None:
    factors = random_factors(600, 16, 12, 7)
    problem = SliceProblem.from_factors(factors, "s")
    assert problem.a.dtype == torch.float32
    draw = torch.Generator().manual_seed(1)
    u, v = torch.linalg.qr(torch.randn(16, 15, generator=draw)).Q, torch.eye(15, 12)
    sigma, error = refit_sigma(problem, u, v)
    expected = torch.stack(
        [(dense(f) - u.double() @ s.double() @ v.double()).square().sum() for f, s in zip(factors, sigma, strict=True)]
    )
    # Factors are exact in fp32 and every product is fp64.
    torch.testing.assert_close(error, expected, rtol=1e-9, atol=0)


def test_captured_energy_is_that_of_each_clusters_bases() -> None:
    factors = random_factors(4, 30, 20, [4, 2, 4, 3])
    problem = SliceProblem.from_factors(factors, "s")
    draw = torch.Generator().manual_seed(1)
    us = torch.linalg.qr(torch.randn(40, 30, 6, generator=draw)).Q
    vs = torch.linalg.qr(torch.randn(40, 20, 6, generator=draw)).Q
    captured = captured_by_cluster(problem, us, vs.mT)  # 40 · 6 columns; more than one block at 512 needs 86
    many = captured_by_cluster(problem, us.repeat(3, 1, 1), vs.mT.repeat(3, 1, 1))
    for j, member in enumerate(problem.members.tolist()):
        w = dense(factors[member])
        expected = torch.stack(
            [(u.double().T @ w @ v.double()).square().sum() / w.square().sum() for u, v in zip(us, vs, strict=True)]
        )
        torch.testing.assert_close(captured[j], expected, rtol=1e-12, atol=0)  # fp64 on both sides
        torch.testing.assert_close(many[j], expected.repeat(3), rtol=1e-12, atol=0)
