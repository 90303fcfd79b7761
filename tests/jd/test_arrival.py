"""Choosing a cluster and growing bases, against dense fp64 projections."""

import pytest
import torch

from tests.jd.dense import dense, family_factors, random_factors
from vllm_jdlora.jd.arrival import captured_by_spans, lifted_columns, missing_directions
from vllm_jdlora.jd.problem import SliceProblem


def projector(columns: torch.Tensor) -> torch.Tensor:
    return columns @ torch.linalg.pinv(columns)


def test_captured_energy_is_that_of_the_spans_whatever_the_basis():
    draw = torch.Generator().manual_seed(0)
    factors = random_factors(3, 30, 20, [2, 5, 3])
    problem = SliceProblem.from_factors(factors, "slice")
    u, v = torch.randn(4, 30, 6, generator=draw), torch.randn(4, 6, 20, generator=draw)  # far from orthonormal
    u[1, :, 4:], v[1, 4:] = 0, 0  # a smaller effective rank
    found = captured_by_spans(problem, u, v, orthonormal=False)
    for position, i in enumerate(problem.members.tolist()):
        w = dense(factors[i])
        for k in range(4):
            kept = projector(u[k].double()) @ w @ projector(v[k].T.double())
            # The products are in fp32: 1e-4 of the energy is enough to choose by.
            assert float(found[position, k]) == pytest.approx(float(kept.square().sum()), rel=1e-4)


def test_orthonormal_bases_need_no_gram_matrix():
    draw = torch.Generator().manual_seed(0)
    problem = SliceProblem.from_factors(random_factors(3, 30, 20, [2, 5, 3]), "slice")
    u = torch.linalg.qr(torch.randn(4, 30, 6, generator=draw)).Q
    v = torch.linalg.qr(torch.randn(4, 20, 6, generator=draw)).Q.mT
    quick, sure = (captured_by_spans(problem, u, v, orthonormal=known) for known in (True, False))
    torch.testing.assert_close(quick, sure, rtol=1e-5, atol=0)  # fp32 products


@pytest.mark.parametrize("ranks", [[3], [3, 2]])
def test_as_many_directions_as_the_adapters_ranks_hold_them_without_loss(ranks):
    draw = torch.Generator().manual_seed(1)
    factors = random_factors(len(ranks), 40, 30, ranks)
    u, v = torch.linalg.qr(torch.randn(40, 5, generator=draw)).Q, torch.linalg.qr(torch.randn(30, 5, generator=draw)).Q
    p, q = missing_directions(SliceProblem.from_factors(factors, "s"), u, v.T, sum(ranks))
    left, right = projector(torch.cat([u.double(), p], 1)), projector(torch.cat([v.double(), q.T], 1))
    for f in factors:
        w = dense(f)
        assert float((w - left @ w @ right).norm() / w.norm()) < 1e-6  # the factors are fp32
    # New columns are orthonormal and outside the old span: fp64.
    assert torch.allclose(p.T @ p, torch.eye(sum(ranks), dtype=torch.float64), atol=1e-12)
    assert float((u.double().T @ p).abs().max()) < 1e-6  # u itself is orthonormal to fp32


def test_few_directions_are_better_than_the_two_sides_taken_separately():
    """Against the leading singular vectors of (I − P)ΔW and ΔW(I − Q): sweeps may only gain."""
    draw = torch.Generator().manual_seed(2)
    factors = family_factors([0, 0, 1], 30, 4, 0.3, seed=3)
    problem = SliceProblem.from_factors(factors, "s")
    u, v = torch.linalg.qr(torch.randn(30, 3, generator=draw)).Q, torch.linalg.qr(torch.randn(30, 3, generator=draw)).Q
    u, v = u.double(), v.double()
    matrices = [dense(f) / dense(f).norm() for f in factors]
    eye = torch.eye(30, dtype=torch.float64)

    def captured(p, q):
        left, right = projector(torch.cat([u, p], 1)), projector(torch.cat([v, q], 1))
        return sum(float((left @ w @ right).square().sum()) for w in matrices)

    separate_p = torch.linalg.svd(torch.cat([(eye - u @ u.T) @ w for w in matrices], 1)).U[:, :2]
    separate_q = torch.linalg.svd(torch.cat([w @ (eye - v @ v.T) for w in matrices], 0)).Vh[:2].T
    p, q = missing_directions(problem, u, v.T, 2)
    assert captured(p, q.T) > captured(separate_p, separate_q) - 1e-9
    # And it is a stationary point: further dense half-steps gain next to nothing.
    right, outside = projector(torch.cat([v, q.T], 1)), eye - u @ u.T
    best_p = _top(sum(outside @ w @ right @ w.T @ outside for w in matrices))
    assert captured(best_p, q.T) - captured(p, q.T) < 1e-3


def _top(gram):
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :2]


def test_adapters_that_the_bases_hold_give_no_new_direction():
    factors = random_factors(1, 20, 20, 3)
    u, v = (torch.linalg.qr(x).Q for x in (factors[0].b, factors[0].a.T))
    p, q = missing_directions(SliceProblem.from_factors(factors, "s"), u, v.T, 2)
    assert not p.any() and not q.any()
    assert p.shape == (20, 2) and q.shape == (2, 20)


def test_columns_are_lifted_out_of_a_metric_without_its_inverse():
    """Dependent columns too, and a metric that mutes some directions: the lift whitens to what was wanted."""
    draw = torch.Generator().manual_seed(4)
    plain = torch.randn(30, 6, generator=draw).double()
    plain = torch.cat([plain, plain[:, :2] @ torch.randn(2, 3, generator=draw).double()], 1)
    root = torch.randn(30, 30, generator=draw).double() @ torch.diag(torch.logspace(0, -6, 30).double())
    whitened = root.T @ plain
    wanted = torch.linalg.qr(whitened[:, :6]).Q[:, 3:5]
    wanted = torch.nn.functional.pad(wanted, (0, 1))
    lifted = lifted_columns(wanted, whitened, plain)
    torch.testing.assert_close(root.T @ lifted, wanted, rtol=0, atol=1e-8)  # fp64 and columns of little energy
    assert not lifted[:, 2].any()
    spanned = plain @ torch.linalg.pinv(plain)
    torch.testing.assert_close(spanned @ lifted, lifted, rtol=1e-8, atol=1e-8)
