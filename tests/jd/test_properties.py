"""Properties that hold for any adapters: hypothesis draws shapes, ranks, scales and gauges."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_jdlora.jd.certificate import certify
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.projection import refit_sigma

# Small matrices: some ten milliseconds each.
FEW = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def collections(draw):
    """Two to five adapters of one slice, of ranks 1 to 4, some of them of very different size, and a joint rank."""
    d_out, d_in = draw(st.integers(5, 14)), draw(st.integers(5, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    adapters = []
    for _ in range(draw(st.integers(2, 5))):
        rho = draw(st.integers(1, 4))
        scale = 10.0 ** draw(st.integers(-6, 6))
        adapters.append(
            Factors(scale * torch.randn(d_out, rho, generator=generator), torch.randn(rho, d_in, generator=generator))
        )
    return adapters, draw(st.integers(1, 5))


def problem_of(adapters):
    return SliceProblem.from_factors(adapters, "slice")


def remaining(adapters, rank):
    """Mean squared relative error of the fit, from dense fp64 products."""
    fit = fit_full(problem_of(adapters), rank, max_sweeps=60)
    lost = []
    for f in adapters:
        delta = f.b.double() @ f.a.double()
        u, v = fit.u.double(), fit.v.double()
        lost.append(float((delta - u @ (u.T @ delta @ v.T) @ v).square().sum() / delta.square().sum()))
    return sum(lost) / len(lost)


@FEW
@given(collections(), st.integers(0, 2**31))
def test_the_fit_knows_products_only_not_how_they_are_factored(drawn, seed):
    adapters, rank = drawn
    generator = torch.Generator().manual_seed(seed)
    other = []
    for f in adapters:
        g = torch.linalg.qr(torch.randn(f.a.shape[0], f.a.shape[0], generator=generator).double()).Q
        other.append(Factors((f.b.double() @ g * 8).float(), (g.T @ f.a.double() / 8).float()))
    # Both end where a sweep gains less than 1e-5 of the error; factors are rounded to fp32 on the way.
    assert abs(remaining(adapters, rank) - remaining(other, rank)) < 1e-3


@FEW
@given(collections(), st.randoms(use_true_random=False))
def test_order_and_size_of_adapters_do_not_matter(drawn, random):
    adapters, rank = drawn
    shuffled = [Factors(f.b * 2.0 ** random.randint(-20, 20), f.a) for f in adapters]
    random.shuffle(shuffled)
    assert abs(remaining(adapters, rank) - remaining(shuffled, rank)) < 1e-3


@FEW
@given(collections())
def test_errors_lie_between_the_certificate_s_bounds(drawn):
    adapters, rank = drawn
    bounds, error = certify(problem_of(adapters), rank), len(adapters) * remaining(adapters, rank)
    assert bounds is not None
    assert bounds.lower - 1e-9 <= error <= bounds.upper + 1e-9
    assert bounds.upper <= 2 * error + 1e-9


@FEW
@given(collections())
def test_more_rank_never_loses_more_and_enough_rank_loses_nothing(drawn):
    adapters, rank = drawn
    assert remaining(adapters, rank + 1) <= remaining(adapters, rank) + 1e-3
    assert remaining(adapters, sum(f.a.shape[0] for f in adapters)) < 1e-10


@FEW
@given(collections(), st.integers(0, 2**31))
def test_refitted_scalings_are_the_least_squares_ones_on_any_bases(drawn, seed):
    adapters, rank = drawn
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = adapters[0].b.shape[0], adapters[0].a.shape[1]
    rank = min(rank, d_out, d_in)
    u, v = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    problem = problem_of(adapters)
    sigma, squared = refit_sigma(problem, u, v)
    for position, i in enumerate(problem.members.tolist()):
        delta = adapters[i].b.double() @ adapters[i].a.double()
        pairs = torch.einsum("ia,bj->abij", u.double(), v.double()).flatten(0, 1).flatten(1)
        best = torch.linalg.lstsq(pairs.T, delta.flatten()[:, None]).solution
        least = float((pairs.T @ best - delta.flatten()[:, None]).square().sum())
        # Σ is fp32: relative to ‖ΔW‖² its rounding costs far less than this even on badly conditioned bases.
        assert abs(float(squared[position]) - least) < 1e-5 * float(delta.square().sum())
        assert sigma[position].isfinite().all()
