"""Where the clusters start: features of the adapters from a few slices, and two ways to group them by seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem

# Side of the random sketch GᵀΔW H of an adapter; inner products of sketches estimate those of ΔW.
_SKETCH = 64
_ITERATIONS = 50
# Draws of each start: local optima are worth more tries where a try is cheap.
_DRAWS, _FEW = 2, 128
# Up to so many adapters the similarity of all pairs is held in memory (1.6 GB) for the balanced start.
_PAIRWISE = 20_000


def candidate_starts(probes: Sequence[SliceProblem], n: int, rank: int, clusters: int, seed: int) -> list[Tensor]:
    """Labels [n] int64 of several starts: k-means and a balanced partition, on each kind of feature.

    k-means finds unequal groups where adapters are clearly related. Adapters that share little are the common
    case, and there balance decides: a basis of rank R serves an extra adapter worse the more it already holds
    (32 real adapters, R 16, K 8: 6.4 % of the energy lost from balanced starts, 7.4 to 11.7 % from k-means).
    """
    starts = []
    for features in _feature_sets(probes, n, rank):
        for number in range(_DRAWS if n <= _FEW else 1):
            draw = torch.Generator().manual_seed(seed + number)
            starts.append(kmeans(features, clusters, draw))
            if n <= _PAIRWISE:
                starts.append(balanced_partition(features @ features.T, clusters, draw))
    return starts


def kmeans(features: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Labels [n] int64 of features [n, D] by k-means++ and Lloyd's iteration; clusters may come out empty."""
    n = len(features)
    first = int(torch.randint(n, (1,), generator=draw))
    centres = features[first : first + 1]
    nearest = torch.full((n,), float("inf"), dtype=features.dtype)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (features - centres[-1]).square().sum(1))
        odds = nearest.double()
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


def balanced_partition(similarity: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Labels [n] int64 of `clusters` groups of equal size (±1) with much similarity [n, n] inside the groups.

    From a random balanced partition, each adapter in turn makes the best swap with another, until none gains.
    """
    n = len(similarity)
    similarity = similarity.clone().fill_diagonal_(0)
    labels = torch.empty(n, dtype=torch.int64)
    labels[torch.randperm(n, generator=draw)] = torch.arange(n) % clusters
    to_group = similarity @ torch.nn.functional.one_hot(labels, clusters).to(similarity.dtype)  # [n, K]
    own = to_group.gather(1, labels[:, None])[:, 0]
    least = 1e-6 * float(similarity.abs().max())  # less is rounding of the running sums
    for _ in range(_ITERATIONS):
        swaps = 0
        for i in range(n):
            group = int(labels[i])
            gain = to_group[i, labels] + to_group[:, group] - own[i] - own - 2 * similarity[i]
            gain[labels == group] = 0
            j = int(gain.argmax())
            if float(gain[j]) <= least:
                continue
            other = int(labels[j])
            labels[i], labels[j] = other, group
            shift = similarity[:, j] - similarity[:, i]
            to_group[:, group] += shift
            to_group[:, other] -= shift
            own = to_group.gather(1, labels[:, None])[:, 0]
            swaps += 1
        if swaps == 0:
            break
    return labels


def _feature_sets(probes: Sequence[SliceProblem], n: int, rank: int) -> list[Tensor]:
    """Kinds of features [n, D] fp32 with unit rows (zero rows for adapters that the probes do not hold).

    The paper's Σ_i of a single-cluster fit, which sees only the common subspace, and a sketch of ΔW_i itself.
    Unit rows, because adapters of large norm otherwise become clusters of their own.
    """
    fitted, sketched = [], []
    for probe in probes:
        fitted.append(_rows(probe, fit_full(probe, rank, max_sweeps=2).sigma, n))
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(stack.shape[1], _SKETCH, generator=draw).to(stack) for stack in (probe.bt, probe.a))
        sketch = probe.sigmas(*probe.times(left, right)) * probe.scale[:, None, None]
        sketched.append(_rows(probe, sketch, n))
    return [torch.nn.functional.normalize(torch.cat(p, 1), dim=1, eps=1e-30) for p in (fitted, sketched)]


def _rows(probe: SliceProblem, values: Tensor, n: int) -> Tensor:
    """[m, r, c] in true scale -> [n, r·c] fp32 in units of the adapters' norms, zero rows for the absent."""
    unit = values.flatten(1).double() / probe.squared_norms.sqrt()[:, None]
    out = torch.zeros(n, unit.shape[1])
    out[probe.members.cpu()] = unit.float().cpu()
    return out
