"""Errors of a variant against dense fp64 matrices and against a mean over inputs."""

import pytest
import torch

from vllm_jdlora.evaluation.output_error import digest, error


def update(seed, rank=3, parts=(("a", 12, 9), ("b", 7, 9))):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator))
        for name, d_out, d_in in parts
    }


def dense(found, name):
    b, a = found[name]
    return b.double() @ a.double()


def test_relative_error_is_that_of_the_dense_matrices():
    mine, other = update(0), update(1, rank=5)
    lost = sum(float((dense(mine, n) - dense(other, n)).square().sum()) for n in mine)
    energy = sum(float(dense(mine, n).square().sum()) for n in mine)
    assert error(mine, other) == pytest.approx((lost / energy) ** 0.5, rel=1e-12)  # fp64 on both sides


def test_output_error_is_the_root_mean_square_over_inputs():
    mine, other = update(0), update(1, rank=5)
    inputs = {n: torch.randn(50, 9, dtype=torch.float64) + i for i, n in enumerate(mine)}
    moments = {n: (x.T @ x / len(x)) for n, x in inputs.items()}
    lost = sum(float((inputs[n] @ (dense(mine, n) - dense(other, n)).T).square().sum()) for n in mine)
    energy = sum(float((inputs[n] @ dense(mine, n).T).square().sum()) for n in mine)
    assert error(mine, other, moments) == pytest.approx((lost / energy) ** 0.5, rel=1e-12)
    with pytest.raises(KeyError):
        error(mine, other, {"a": moments["a"]})


def test_a_slice_that_is_left_out_is_lost_and_one_that_is_new_is_error():
    mine = update(0)
    part = float(dense(mine, "a").square().sum() / sum(dense(mine, n).square().sum() for n in mine))
    assert error(mine, {"b": mine["b"]}) == pytest.approx(part**0.5, rel=1e-12)
    assert error(mine, {}) == pytest.approx(1)
    assert error({"b": mine["b"]}, mine) == pytest.approx((part / (1 - part)) ** 0.5, rel=1e-12)
    assert error({}, {}) == 0 and error({}, mine) == float("inf")


def test_other_factors_of_the_same_update_have_no_error():
    mine = update(0)
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    same = {n: ((b.double() @ turned), turned.T @ a.double()) for n, (b, a) in mine.items()}
    # Squares cancel down to fp64's 1e-16 of the energy, so the error down to about its root.
    assert error(mine, same) < 1e-7
    assert digest(mine) == digest({n: (b.clone(), a.clone()) for n, (b, a) in reversed(mine.items())})
    assert digest(mine) != digest(same)
