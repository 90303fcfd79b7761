"""One visit of a slice: what is stored is measured exactly, in the metric as well, by either method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.jd.dense import ListSource, dense, family_factors, random_factors
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.metric import SliceMetric
from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.projection import squared_errors
from vllm_jdlora.jd.slice_fit import ScalingOverflow, SliceFit, SliceRecipe, fit_slice

LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 2])
BF16 = {"cast": torch.Tensor.bfloat16, "sigma_dtype": torch.bfloat16}


def seven() -> list[Factors | None]:
    return [*random_factors(5, 40, 30, [2, 5, 3, 3, 4]), None, *random_factors(1, 40, 30, 6, seed=9)]


def second_moment() -> Tensor:
    """Inputs that differ much in energy and are correlated."""
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(3)).double() * torch.logspace(0, -2, 30)
    x = x + x[:, :1]
    return x.T @ x / len(x)


def approximation(fit: SliceFit, i: int) -> Tensor:
    sigma = fit.sigma[i].double()
    sigma = torch.diag(sigma) if sigma.ndim == 1 else sigma
    k = int(LABELS[i])
    return fit.u[k].double() @ sigma @ fit.v[k].double()


def metric_named(name: str | None) -> SliceMetric | None:
    if name is None:
        return None
    metric = SliceMetric.of(second_moment(), "x")
    return metric if name == "input" else metric.with_gradients(gradient_moment(), "x")


def gradient_moment() -> torch.Tensor:
    draw = torch.Generator().manual_seed(9)
    g = torch.randn(200, 40, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, 40).double()
    return g.T @ g / 200


@pytest.mark.parametrize("method", ["full", "diag"])
@pytest.mark.parametrize("metric", [None, "input", "loss"])
def test_errors_are_those_of_the_values_as_stored(method: str, metric: str | None) -> None:
    factors = seven()
    within = metric_named(metric)
    recipe = SliceRecipe(rank=4, method=method, **BF16)  # type: ignore[arg-type]
    fit = fit_slice(SliceProblem.from_factors(factors, "x"), LABELS, 3, recipe, metric=within)
    assert fit.u.dtype == fit.v.dtype == fit.sigma.dtype == torch.bfloat16
    for i, f in enumerate(factors):
        w = torch.zeros(40, 30, dtype=torch.float64) if f is None else dense(f)
        lost = w - approximation(fit, i)
        # fp64 sums on both sides
        torch.testing.assert_close(fit.squared_error[i], lost.square().sum(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fit.squared_norm[i], w.square().sum(), rtol=1e-9, atol=0)
        if within:
            assert fit.output_error is not None and fit.output_norm is not None
            left = torch.eye(40, dtype=torch.float64) if within.root_out is None else within.root_out.T
            expected = (left @ lost @ within.root_in).square().sum()
            torch.testing.assert_close(fit.output_error[i], expected, rtol=1e-9, atol=1e-12)
            norm = (left @ w @ within.root_in).square().sum()
            torch.testing.assert_close(fit.output_norm[i], norm, rtol=1e-9, atol=0)
    assert not fit.sigma[5].any() and fit.relative()[5] == 0


def test_the_metric_lowers_the_error_of_outputs_and_raises_the_other() -> None:
    problem = SliceProblem.from_factors(family_factors([0, 1, 0, 1, 1, 0, 0], 40, 4, 0.3)[:7], "x")
    problem = replace(problem, a=problem.a[:, :30].contiguous())
    labels = torch.zeros(7, dtype=torch.int64)
    metric = SliceMetric.of(second_moment(), "x")
    recipe = SliceRecipe(rank=4)
    plain, weighted = (fit_slice(problem, labels, 1, recipe, metric=m) for m in (None, metric))
    assert weighted.squared_error.sum() > plain.squared_error.sum()
    outputs = squared_errors(metric.applied_to(problem), plain.u[0], plain.sigma, metric.whitened(plain.v[0].double()))
    assert weighted.output_norm is not None and weighted.output_error is not None
    assert (weighted.output_error / weighted.output_norm).sum() < (outputs / weighted.output_norm).sum()


@pytest.mark.parametrize("method", ["full", "diag"])
def test_captured_energy_is_what_the_error_leaves_for_bases_that_are_not_cast(method: str) -> None:
    fit = fit_slice(SliceProblem.from_factors(seven(), "x"), LABELS, 3, SliceRecipe(rank=4, method=method))
    own = fit.captured.gather(1, LABELS[:, None])[:, 0]
    present = fit.squared_norm > 0
    torch.testing.assert_close(own[present], 1 - fit.relative()[present], rtol=0, atol=1e-5)  # bases are fp32
    assert bool((fit.captured <= 1 + 1e-5).all()) and not fit.captured[5].any()


@pytest.mark.parametrize("metric", [None, "input", "loss"])
def test_a_refit_is_no_worse_than_the_stored_bases_it_starts_from(metric: str | None) -> None:
    within = metric_named(metric)
    problem = SliceProblem.from_factors(seven(), "x")
    recipe = SliceRecipe(rank=3, **BF16)  # type: ignore[arg-type]
    first = fit_slice(problem, LABELS, 3, recipe, metric=within)
    again = fit_slice(problem, LABELS, 3, recipe, metric=within, before=first, changed=[0, 1, 2])
    # Both are rounded to bf16: 2⁻⁹ of each value, squared, for seven adapters, and a share of the error itself.
    assert again.relative().sum() <= first.relative().sum() * 1.001 + 7 * 4.0**-9


def test_scalings_beyond_their_dtype_name_the_adapter() -> None:
    factors = seven()
    factors[3] = Factors(factors[3].b * 1e6, factors[3].a)  # type: ignore[union-attr]
    with pytest.raises(ScalingOverflow) as caught:
        fit_slice(SliceProblem.from_factors(factors, "x"), LABELS, 3, SliceRecipe(rank=4, sigma_dtype=torch.float16))
    assert caught.value.adapter == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "max_sweeps": 0}, "max_sweeps 0"),
        ({"rank": 2, "method": "cp"}, "'cp' is not one of full, diag"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(JDLoRAError, match=message):
        SliceRecipe(**options)  # type: ignore[arg-type]


def test_losses_count_half_way_between_as_they_are_and_by_each_adapters_own_norm() -> None:
    factors = [Factors(f.b * 2.0**i, f.a) for i, f in enumerate(random_factors(5, 40, 30, 3))]
    source = ListSource([factors])

    def weighted(name: str) -> SliceProblem:
        metric = metric_named(name)
        assert metric is not None
        return Slices(source, lambda _: metric).weighted_by([0])[0]

    output, loss = weighted("input"), weighted("loss")
    torch.testing.assert_close(output.importance, torch.ones(5, dtype=torch.float64))
    norms = loss.squared_norms
    torch.testing.assert_close(loss.importance, (norms / norms.mean()).sqrt())
