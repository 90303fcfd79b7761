"""The activation metric against dense fp64 computations with the second moment itself."""

import pytest
import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.metric import SliceMetric
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.projection import refit_sigma


def adapters(n=6, d_out=30, d_in=40, rho=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [Factors(torch.randn(d_out, rho, generator=draw), torch.randn(rho, d_in, generator=draw)) for _ in range(n)]


def moment(d_in=40, tokens=400, seed=1):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d_in, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, d_in).double()
    return x.T @ x / tokens


def output_energy(delta, c):
    """E‖ΔW x‖² = tr(ΔW C ΔWᵀ)."""
    return float((delta @ c * delta).sum())


def fitted(factors, c, rank, ridge):
    problem = SliceProblem.from_factors(factors, "m")
    metric = SliceMetric.of(c, "m", ridge)
    whitened = metric.applied_to(problem)
    fit = fit_full(whitened, rank, max_sweeps=200)
    return problem, metric, whitened, fit


def lost(factors, u, v, sigmas, c):
    """Mean of E‖(ΔW − UΣV)x‖²/E‖ΔWx‖² over adapters."""
    shares = []
    for f, sigma in zip(factors, sigmas, strict=True):
        delta = f.b.double() @ f.a.double()
        shares.append(output_energy(delta - u.double() @ sigma.double() @ v.double(), c) / output_energy(delta, c))
    return sum(shares) / len(shares)


def test_the_measured_energy_is_the_output_energy_of_the_dense_adapter():
    factors, c = adapters(), moment()
    _, _, whitened, _ = fitted(factors, c, 4, 0.0)
    unit = c.diagonal().mean()
    for f, norm in zip(factors, whitened.squared_norms.tolist(), strict=True):
        assert norm * float(unit) == pytest.approx(output_energy(f.b.double() @ f.a.double(), c), rel=1e-9)


def test_lifted_bases_without_an_inverse_equal_the_inverse_route():
    draw = torch.Generator().manual_seed(5)
    left, right = torch.randn(30, 5, generator=draw), torch.randn(5, 40, generator=draw)
    factors = [
        Factors(
            left @ torch.randn(5, 3, generator=draw) + 0.01 * f.b,
            torch.randn(3, 5, generator=draw) @ right + 0.01 * f.a,
        )
        for f in adapters()
    ]  # nearly in one subspace, so that the iteration converges to rounding
    problem, metric, whitened, fit = fitted(factors, moment(), 5, 1e-3)
    _, lifted = metric.lifted(problem, whitened, fit.u, fit.v)
    inverse = torch.linalg.solve_triangular(metric.root_in, fit.v.double(), upper=False, left=False)
    # The half-sweep moves the bases by the last sweep's change, which the stopping test bounds.
    assert torch.allclose(lifted.double(), inverse, atol=1e-3 * float(inverse.abs().max()))
    assert torch.allclose(metric.whitened(lifted), fit.v, atol=1e-3)


def test_the_weighted_optimum_loses_less_output_energy_than_plain_bases_even_with_their_best_sigma():
    factors, c = adapters(n=8), moment()
    problem, metric, whitened, fit = fitted(factors, c, 6, 1e-9)
    _, v = metric.lifted(problem, whitened, fit.u, fit.v)
    weighted, _ = refit_sigma(whitened, fit.u, metric.whitened(v))
    plain = fit_full(problem, 6, max_sweeps=200)
    refitted, squared = refit_sigma(whitened, plain.u, metric.whitened(plain.v))
    loss_weighted, loss_refitted, loss_plain = (
        lost(factors, *bases, c)
        for bases in (
            (fit.u, v, weighted),
            (plain.u, plain.v, refitted),
            (plain.u, plain.v, plain.sigma),
        )
    )
    assert loss_weighted < loss_refitted < loss_plain
    share = float((squared / whitened.squared_norms).mean())
    assert share == pytest.approx(loss_refitted, rel=1e-5)  # the ridge of 1e-9 is all that differs


def test_a_second_moment_of_low_rank_does_no_harm():
    """Directions that the input never has cost nothing, and V stays finite and small there."""
    factors = adapters()
    c = moment(tokens=12)
    problem, metric, whitened, fit = fitted(factors, c, 5, 1e-6)
    _, v = metric.lifted(problem, whitened, fit.u, fit.v)
    sigma, _ = refit_sigma(whitened, fit.u, metric.whitened(v))
    expected = 1 - fit.captured[-1] / len(factors)
    assert lost(factors, fit.u, v, sigma, c) == pytest.approx(expected, abs=1e-4)


def test_isotropic_inputs_give_plain_joint_diagonalisation():
    factors = adapters()
    problem, metric, whitened, fit = fitted(factors, 7.0 * torch.eye(40), 5, 1e-3)
    plain = fit_full(problem, 5, max_sweeps=200)
    assert fit.captured[-1] == pytest.approx(plain.captured[-1], rel=1e-6)
    _, lifted = metric.lifted(problem, whitened, fit.u, fit.v)
    lifted = lifted / lifted.norm(dim=1, keepdim=True)
    assert torch.allclose(lifted.double(), plain.v.double(), atol=1e-2)


def test_padding_beyond_the_effective_rank_stays_zero():
    factors = adapters(n=1, rho=2)
    problem, metric, whitened, fit = fitted(factors, moment(), 5, 1e-3)
    _, v = metric.lifted(problem, whitened, fit.u, fit.v)
    assert not v[2:].any()
    _, squared = refit_sigma(whitened, fit.u, metric.whitened(v))
    assert float(squared[0] / whitened.squared_norms[0]) < 1e-10  # rank 2 in two columns: nothing is lost


@pytest.mark.parametrize(
    ("c", "problem"),
    [
        (torch.zeros(4, 4), "zero"),
        (torch.ones(4, 3), "shape"),
        (torch.eye(4) * float("nan"), "not finite"),
        (torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])), "negative"),
    ],
)
def test_what_is_no_second_moment_is_refused(c, problem):
    with pytest.raises(JDLoRAError, match=problem):
        SliceMetric.of(c, "m")


def gradients(d_out=30, seed=7):
    return moment(d_out, seed=seed)


def loss_energy(delta, c, g):
    """E(gᵀΔW x)² for independent g and x = tr(G ΔW C ΔWᵀ)."""
    return float((g @ delta @ c * delta).sum())


def fitted_to_loss(factors, c, g, rank, ridge=0.0):
    problem = SliceProblem.from_factors(factors, "m")
    metric = SliceMetric.of(c, "m", ridge).with_gradients(g, "m", ridge)
    whitened = metric.applied_to(problem)
    return problem, metric, whitened, fit_full(whitened, rank, max_sweeps=200)


def test_with_gradients_the_measured_energy_is_that_of_the_loss():
    factors, c, g = adapters(), moment(), gradients()
    _, _, whitened, _ = fitted_to_loss(factors, c, g, 4)
    unit = float(c.diagonal().mean() * g.diagonal().mean())
    for f, norm in zip(factors, whitened.squared_norms.tolist(), strict=True):
        assert norm * unit == pytest.approx(loss_energy(f.b.double() @ f.a.double(), c, g), rel=1e-9)


def test_with_gradients_one_adapter_gets_its_svd_in_that_metric():
    factors, c, g = adapters(n=1, rho=6), moment(), gradients()
    problem, metric, whitened, fit = fitted_to_loss(factors, c, g, 3)
    u, v = metric.lifted(problem, whitened, fit.u, fit.v)
    sigma, _ = refit_sigma(whitened, metric.whitened_out(u.double()), metric.whitened(v.double()))
    delta = factors[0].b.double() @ factors[0].a.double()
    unit = float(c.diagonal().mean() * g.diagonal().mean())
    left, right = torch.linalg.cholesky(g), torch.linalg.cholesky(c)
    best = torch.linalg.svdvals(left.T @ delta @ right)[3:].square().sum()
    lost = loss_energy(delta - u.double() @ sigma[0].double() @ v.double(), c, g)
    # The stored values are fp32, and the metric's weights span four orders of magnitude.
    assert lost == pytest.approx(float(best), rel=1e-3)
    assert unit > 0 and torch.allclose(metric.whitened_out(u.double()).float(), fit.u.float(), atol=1e-3)


def test_bases_lifted_from_gradients_without_full_rank_are_finite():
    draw = torch.Generator().manual_seed(3)
    few = torch.randn(5, 30, generator=draw, dtype=torch.float64)
    factors, c = adapters(), moment()
    problem, metric, whitened, fit = fitted_to_loss(factors, c, few.T @ few, 4, ridge=1e-3)
    u, v = metric.lifted(problem, whitened, fit.u, fit.v)
    assert u.isfinite().all() and v.isfinite().all()
    assert torch.allclose(metric.whitened_out(u.double()), fit.u.double(), atol=1e-3)


def test_isotropic_gradients_change_nothing():
    factors, c = adapters(), moment()
    _, _, _, fit = fitted_to_loss(factors, c, 3.0 * torch.eye(30).double(), 5)
    _, _, _, alone = fitted(factors, c, 5, 0.0)
    assert fit.captured[-1] == pytest.approx(alone.captured[-1], rel=1e-9)
