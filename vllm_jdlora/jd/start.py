"""Where the search for clusters starts: groups by how much adapters share in a few slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import SliceProblem

# Side of the random sketch GᵀΔW H of an adapter; inner products of sketches estimate those of ΔW.
_SKETCH = 64
_ITERATIONS = 50
# Groupings are cheap and only the tightest of several is returned; each returned one costs a fit on the probes,
# so several are returned only where fits are cheap too.
_TRIES = 8
_DRAWS, _FEW = 2, 128
# Up to so many adapters the similarities of all pairs fit in memory (1.6 GB).
_PAIRWISE = 20_000


def candidate_starts(alike: Sequence[Tensor], n: int, clusters: int, seed: int) -> list[Tensor]:
    """Labels [n] int64 of several starts: related and balanced groups by each kind of similarity, of `similarities`.

    Related groups are right where adapters clearly come in families. Adapters that share little are the common case,
    and there balance decides: a basis of rank R serves one more adapter worse the more it already holds (32 real
    adapters, 8 slices, R 16, K 8: 6.4 % of the energy lost from balanced starts, 7.4 to 11.7 % from k-means on Σ).
    """
    if n > _PAIRWISE:
        return [_even_labels(n, clusters, torch.Generator().manual_seed(seed))]
    starts = []
    for similarity in alike:
        for number in range(_DRAWS if n <= _FEW else 1):
            draw = torch.Generator().manual_seed(seed + number)
            starts.append(related_groups(similarity, clusters, draw))
            starts.append(balanced_groups(similarity, clusters, draw))
    return starts


def related_groups(similarity: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Labels [n] int64: k-means on similarities [n, n] (unit diagonal), the tightest of a few draws.

    Each adapter joins the group whose *other* members resemble it most on average: a mean that counts the adapter
    itself pins it to where it is when everything else is nearly orthogonal. Groups may come out empty.
    """
    others = similarity.clone().fill_diagonal_(0)
    tries = []
    for _ in range(_TRIES):
        labels = similarity[:, _distinct(similarity, clusters, draw)].argmax(1)
        for _ in range(_ITERATIONS):
            tightness, new = _mean_to_groups(others, labels, clusters).max(1)
            if torch.equal(new, labels):
                break
            labels = new
        tries.append((float(tightness.double().sum()), labels))
    return max(tries, key=lambda tried: tried[0])[1]


def balanced_groups(similarity: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """Labels [n] int64 of `clusters` groups of equal size (±1) with much similarity [n, n] inside the groups.

    From a random even partition, each adapter in turn makes the best swap with another, until none gains.
    """
    n = len(similarity)
    similarity = similarity.clone().fill_diagonal_(0)
    labels = _even_labels(n, clusters, draw)
    to_group = similarity @ _one_hot(labels, clusters, similarity)  # [n, K]
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


def similarity_of(probes: Sequence[SliceProblem], n: int) -> Tensor:
    """Squared cosines of ΔW_i averaged over slices [n, n] fp32, unit diagonal (zero for those without any).

    Adapters in one subspace with opposite or mixed signs share bases just as well as those of equal sign: hence
    squares.
    """
    total = torch.zeros(n, n)
    for probe in probes:
        draw = torch.Generator().manual_seed(0)
        left, right = (torch.randn(stack.shape[1], _SKETCH, generator=draw).to(stack) for stack in (probe.bt, probe.a))
        sketch = _rows(probe, probe.sigmas(*probe.times(left, right)) * probe.scale[:, None, None], n)
        sketch = torch.nn.functional.normalize(sketch, dim=1, eps=1e-30)
        total += (sketch @ sketch.T).square()
    return _with_unit_diagonal(total)


def similarities(probes: Sequence[SliceProblem], n: int, rank: int) -> list[Tensor]:
    """Two kinds of similarity [n, n] fp32 with unit diagonal (zero for adapters that the probes do not hold).

    The paper's: cosine of the Σ_i of a single-cluster fit, all slices concatenated; it sees only the common subspace.
    And `similarity_of`. Both have adapters of unit norm, else those of large norm become clusters of their own. None
    where those of all pairs are too many for memory.
    """
    if n > _PAIRWISE:
        return []
    fitted = torch.zeros(n, n)
    for probe in probes:
        sigma = _rows(probe, fit_full(probe, rank, max_sweeps=2).sigma, n)
        fitted += sigma @ sigma.T
    return [_with_unit_diagonal(fitted), similarity_of(probes, n)]


def _with_unit_diagonal(similarity: Tensor) -> Tensor:
    length = similarity.diagonal().sqrt().clamp_min(1e-15)
    return similarity / length[:, None] / length


def _rows(probe: SliceProblem, values: Tensor, n: int) -> Tensor:
    """[m, r, c] in true scale -> [n, r·c] fp32 in units of the adapters' norms, zero rows for the absent."""
    unit = values.flatten(1).double() / probe.squared_norms.sqrt()[:, None]
    out = torch.zeros(n, unit.shape[1])
    out[probe.members.cpu()] = unit.float().cpu()
    return out


def _distinct(similarity: Tensor, clusters: int, draw: torch.Generator) -> list[int]:
    """k-means++: K adapters, each next one drawn by its squared distance from those before."""
    n = len(similarity)
    chosen = [int(torch.randint(n, (1,), generator=draw))]
    nearest = torch.full((n,), float("inf"), dtype=torch.float64)
    for _ in range(clusters - 1):
        nearest = torch.minimum(nearest, (1 - similarity[chosen[-1]].double()).clamp_min(0))
        nearest[chosen] = 0
        odds = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(odds, 1, generator=draw)))
    return chosen


def _mean_to_groups(others: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """[n, K] mean similarity of each adapter to the members of each group other than itself (0 if there are none)."""
    one_hot = _one_hot(labels, clusters, others)
    return (others @ one_hot) / (one_hot.sum(0) - one_hot).clamp_min(1)


def _one_hot(labels: Tensor, clusters: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, clusters).to(like.dtype)


def _even_labels(n: int, clusters: int, draw: torch.Generator) -> Tensor:
    labels = torch.empty(n, dtype=torch.int64)
    labels[torch.randperm(n, generator=draw)] = torch.arange(n) % clusters
    return labels
