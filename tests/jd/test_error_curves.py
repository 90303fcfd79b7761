"""Error curves: predicted errors are those of real fits, and the slices they come from stand for all."""

from __future__ import annotations

import math

import pytest
import torch

from tests.jd.conftest import RANKS, SLICES
from tests.jd.dense import ListSource, dense, random_factors
from vllm_jdlora.jd.clustering import weighted_slices
from vllm_jdlora.jd.error_curves import ErrorCurves, cluster_grid, curves_of, error_curves
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem


def test_the_grid_ends_with_the_svd_of_each_adapter() -> None:
    assert cluster_grid(1) == (1,) and cluster_grid(2) == (1, 2) and cluster_grid(9) == (1, 2, 3, 4, 9)
    assert max(cluster_grid(1000)[:-1]) <= 500


def test_predicted_errors_are_those_of_a_fit_at_every_rank(measured: ErrorCurves) -> None:
    row = measured.clusters.index(2)
    assert len({tuple(measured.labels[row, :4].tolist()), tuple(measured.labels[row, 4:].tolist())}) == 2
    for column, rank in enumerate(RANKS):
        for m, factors in enumerate(SLICES):
            for part in (slice(0, 4), slice(4, 8)):
                fit = fit_full(SliceProblem.from_factors(factors[part], "s"), rank, max_sweeps=100)
                own = 4 - fit.captured[-1]
                nested = measured.squared_error[row, column, part, m] / measured.squared_norm[part, m]
                # One sweep from the leading columns is never better than the best of its rank, but for the digits that
                # convergence leaves; it misses most below the family's own rank, 3.
                assert own - 1e-3 <= float(nested.sum()) <= own * 1.05 + 0.01


def test_more_rank_never_loses_more(measured: ErrorCurves) -> None:
    assert float(measured.relative_squared().mean(2).diff(dim=1).max()) <= 1e-12
    assert float(measured.squared_error[:, -1].max()) < 1e-9  # rank 24 holds any matrix here


def test_as_many_clusters_as_adapters_are_truncated_svds(measured: ErrorCurves) -> None:
    for column, rank in enumerate(RANKS):
        for i in range(8):
            tails = [torch.linalg.svdvals(dense(factors[i]))[rank:].square().sum() for factors in SLICES]
            norms = [dense(factors[i]).square().sum() for factors in SLICES]
            expected = float(sum(tails) / sum(norms))
            assert float(measured.relative_squared()[-1, column, i]) == pytest.approx(expected, abs=1e-9)


def test_an_adapter_that_no_probe_holds_counts_as_the_worst() -> None:
    factors = [*random_factors(4, 20, 20, 3), None]
    curves = error_curves([SliceProblem.from_factors(factors, "s")], 5, clusters=(1,), ranks=(2, 4))
    relative = curves.relative_squared()
    assert torch.equal(relative[:, :, 4], relative[:, :, :4].amax(2))


def test_curves_of_a_source_are_those_of_its_probes() -> None:
    curves = curves_of(weighted_slices(ListSource(SLICES), None, 0))
    assert curves.n == 8 and curves.clusters == cluster_grid(8) and curves.squared_norm.shape == (8, 2)
    assert math.isclose(float(curves.relative_squared()[-1, -1].max()), 0, abs_tol=1e-9)  # rank 64 holds it all
