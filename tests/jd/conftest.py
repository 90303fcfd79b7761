"""Two families of adapters and their error curves, for the tests of curves and of budgets."""

from __future__ import annotations

import pytest

from tests.jd.dense import family_factors
from vllm_jdlora.jd.error_curves import ErrorCurves, error_curves
from vllm_jdlora.jd.problem import SliceProblem

FAMILIES = [0, 0, 0, 0, 1, 1, 1, 1]
SLICES = [family_factors(FAMILIES, 24, 3, 0.1, seed=m) for m in range(2)]
RANKS = (1, 2, 3, 4, 6, 24)


@pytest.fixture(scope="session")
def measured() -> ErrorCurves:
    probes = [SliceProblem.from_factors(factors, "s") for factors in SLICES]
    return error_curves(probes, 8, clusters=(1, 2, 3, 8), ranks=RANKS, effort=0)
