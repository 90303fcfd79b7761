"""Where the clusters start: features of adapters from a few slices, and seeded k-means++ on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem

# Side of the random sketch GᵀΔW H of an adapter; inner products of sketches estimate those of ΔW.
_SKETCH = 64
_ITERATIONS = 50


def feature_sets(probes: Sequence[SliceProblem], n: int, rank: int) -> Iterator[Tensor]:
    """Kinds of features [n, D] fp32 with unit rows (zero rows for adapters that the probes do not hold).

    First the paper's: Σ_i of a single-cluster fit, which sees only the common subspace. Then a sketch of ΔW itself.
    Unit rows because adapters of large norm otherwise become clusters of their own.
    """
    fitted, sketched = [], []
    for probe in probes:
        fit = fit_full(probe, rank, max_sweeps=2)
        fitted.append(_rows(probe, fit.sigma, n))
        draw = torch.Generator().manual_seed(0)
        left, right = (
            torch.randn(stack.shape[1], _SKETCH, generator=draw).to(stack) / stack.shape[1] ** 0.5
            for stack in (probe.bt, probe.a)
        )
        sketch = probe.sigmas(*probe.times(left, right)) * probe.scale[:, None, None]
        sketched.append(_rows(probe, sketch, n))
    for parts in (fitted, sketched):
        yield torch.nn.functional.normalize(torch.cat(parts, 1), dim=1, eps=1e-30)


def kmeans(features: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Labels [n] int64 of unit-row features [n, D] by k-means++ and Lloyd's iteration."""
    n = len(features)
    first = int(torch.randint(n, (1,), generator=draw))
    centres = features[first : first + 1]
    nearest = torch.full((n,), float("inf"), dtype=features.dtype)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (features - centres[-1]).square().sum(1))
        odds = nearest.double().clamp_min(0)
        odds = odds if float(odds.sum()) > 0 else torch.ones_like(odds)
        chosen = int(torch.multinomial(odds, 1, generator=draw))
        centres = torch.cat([centres, features[chosen : chosen + 1]])
    labels = torch.full((n,), -1)
    for _ in range(_ITERATIONS):
        new = (centres.square().sum(1) - 2 * features @ centres.T).argmin(1)
        if torch.equal(new, labels):
            break
        labels = new
        one_hot = torch.nn.functional.one_hot(labels, clusters).to(features.dtype)
        sizes = one_hot.sum(0)[:, None]
        centres = torch.where(sizes > 0, one_hot.T @ features / sizes.clamp_min(1), centres)
    return labels


def _rows(probe: SliceProblem, values: Tensor, n: int) -> Tensor:
    """[m, r, c] in true scale -> [n, r·c] fp32 in units of the adapters' norms, zero rows for the absent."""
    unit = values.flatten(1).double() / probe.squared_norms.sqrt()[:, None]
    out = torch.zeros(n, unit.shape[1])
    out[probe.members.cpu()] = unit.float().cpu()
    return out
