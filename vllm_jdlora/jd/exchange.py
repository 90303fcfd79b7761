"""Steps from one assignment to a better one, each verified by joint fits of exactly the sets that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_jdlora.jd.cores import Bases, Cores

Group = tuple[int, ...]

# A step must gain more than this share of what an adapter can have: less is rounding.
_RELEVANT = 1e-6
# Exchanges are verified by estimated gain, so many at first, twice as many whenever none of them gains.
_SHORTLIST = 40
# Adapters that are offered for exchanges where all pairs would be too many.
_OFFERED = 512
# Left-out fits: members of a cluster in so many parts, each measured on bases fitted without it.
_PARTS = 4
# Clusters tried for each adapter, most similar members first, where many clusters make all of them too many.
_NEIGHBOURS = 8
# Changes proposed by estimates stop when a round of them lowers the error by less than this share of it.
_SMALL_GAIN = 3e-4
# Halvings of a batch of moves that together lower the energy.
_HALVINGS = 4


@dataclass
class Evaluator:
    """Captured energy of sets of adapters, each fitted once; counts nominal seconds of one core against a budget.

    The count comes from set sizes, not from a clock, so that a seed gives the same result on a busy machine.
    """

    cores: Cores
    rank: int
    budget: float
    spent: float = 0.0
    steps: list[float] = field(default_factory=list)  # total energy after each accepted step
    _known: dict[Group, float] = field(default_factory=dict)

    def energies(self, groups: Sequence[Group]) -> list[float]:
        """Energy that joint bases capture of each group, summed over members and slices; 0 for an empty one."""
        unknown: dict[int, dict[Group, None]] = {}
        for group in groups:
            if group and group not in self._known:
                unknown.setdefault(len(group), {})[group] = None
        for size, new in unknown.items():
            captured = self.cores.captured(torch.tensor(list(new)), self.rank).sum(1)
            self._known.update(zip(new, captured.tolist(), strict=True))
            self.spent += self.cores.seconds(size) * len(new)
        return [self._known[group] if group else 0.0 for group in groups]

    def total(self, groups: Sequence[Group]) -> float:
        """Energy captured in all groups together: what the search raises."""
        return sum(self.energies(groups))

    def bases(self, group: Group) -> Bases:
        """Bases of one group, for measuring other adapters on them."""
        self.spent += self.cores.seconds(len(group))
        return self.cores.bases(torch.tensor(group), self.rank)

    @property
    def most(self) -> float:
        """The total if nothing were lost."""
        return float(self.cores.weight.sum())

    @property
    def least(self) -> float:
        """The smallest gain that counts."""
        return _RELEVANT * len(self.cores.left)


def groups_of(labels: Tensor, clusters: int) -> list[Group]:
    """Members of each cluster, ascending, from labels [n]."""
    members: list[list[int]] = [[] for _ in range(clusters)]
    for adapter, k in enumerate(labels.tolist()):
        members[k].append(adapter)
    return [tuple(each) for each in members]


def labels_of(groups: Sequence[Group], n: int) -> Tensor:
    """Labels [n] int64 of groups."""
    labels = torch.zeros(n, dtype=torch.int64)
    for k, group in enumerate(groups):
        labels[list(group)] = k
    return labels


def exchanged(group: Group, out: Iterable[int], into: Iterable[int]) -> Group:
    """The group without the adapters `out` and with those of `into`."""
    return tuple(sorted((set(group) - set(out)) | set(into)))


def improve_by_exchange(
    evaluator: Evaluator,
    groups: Sequence[Group],
    similarity: Tensor,
    until: float,
    advance: Callable[[], None],
    *,
    exact: bool = True,
) -> list[Group]:
    """Moves of one adapter and swaps of two, best first, until none gains or `until` nominal seconds are spent.

    What an adapter adds to a cluster depends on who else competes for the R directions, hardly on how well the
    cluster's present bases happen to capture it: so what it adds and what its own cluster gains without it come from
    fits of those very sets. (Assignment by the present bases never moves an adapter out of a small cluster.) Where
    there are too many such sets (not `exact`), the gains are those of `improve_in_bulk`, only to propose changes.
    Every change is verified; those of different clusters are made in one round, as their energies simply add.
    """
    groups = list(groups)
    width = _SHORTLIST
    while evaluator.spent < until:
        gains = (_marginal_gains if exact else _bulk_gains)(evaluator, groups, similarity)
        steps = _verified(evaluator, groups, _proposals(groups, gains, width), until)
        touched: set[int] = set()
        gained = 0.0
        for step in sorted(steps, key=lambda step: (-step.gain, step.clusters, step.out, step.into)):
            a, b = step.clusters
            if step.gain <= evaluator.least or touched & {a, b}:
                continue
            touched |= {a, b}
            groups[a] = exchanged(groups[a], step.out, step.into)
            groups[b] = exchanged(groups[b], step.into, step.out)
            gained += step.gain
        if touched:
            evaluator.steps.append(evaluator.total(groups))
            advance()
        if not exact and gained < _SMALL_GAIN * (evaluator.most - evaluator.total(groups)):
            break
        if not touched and width >= evaluator.cores.n**2:
            break
        width *= 1 if touched else 4
    return groups


def improve_in_bulk(
    evaluator: Evaluator, groups: Sequence[Group], similarity: Tensor, until: float, advance: Callable[[], None]
) -> list[Group]:
    """Many moves at a time, for collections where fitting each single change costs too much.

    Each adapter is measured on the bases of other clusters and, fairly, on bases of its own cluster fitted without
    it. All moves that gain are made together, or the best half of them, or the best quarter…, the first that raises
    the total.
    """
    groups = list(groups)
    total = evaluator.total(groups)
    while evaluator.spent < until:
        gains = _bulk_gains(evaluator, groups, similarity)
        gain, to = gains.max(1)
        own = labels_of(groups, evaluator.cores.n)
        order = [i for i in gain.argsort(descending=True, stable=True).tolist() if gain[i] > evaluator.least]
        for _ in range(_HALVINGS):
            if not order:
                return groups
            labels = own.clone()
            labels[order] = to[order]
            tried = groups_of(labels, len(groups))
            after = evaluator.total(tried)
            if after > total + evaluator.least:
                break
            order = order[: len(order) // 2]
        else:
            return groups
        groups, total = tried, after
        evaluator.steps.append(total)
        advance()
    return groups


def _candidates(groups: Sequence[Group], similarity: Tensor) -> Tensor:
    """[n, K] bool: the clusters worth trying for each adapter, never its own; empty ones always."""
    n, clusters = len(similarity), len(groups)
    one_hot = torch.nn.functional.one_hot(labels_of(groups, n), clusters).to(similarity.dtype)
    sizes = one_hot.sum(0)
    own = one_hot.bool()
    if clusters <= 2 * _NEIGHBOURS:
        return ~own
    near = (similarity @ one_hot / sizes.clamp_min(1)).masked_fill(own, -1.0).topk(_NEIGHBOURS, dim=1).indices
    return (torch.zeros_like(own).scatter(1, near, True) | (sizes == 0)) & ~own


def _marginal_gains(evaluator: Evaluator, groups: Sequence[Group], similarity: Tensor) -> Tensor:
    """[n, K]: exact change of the total if an adapter moves to a cluster; −inf where that was not tried."""
    n = evaluator.cores.n
    before = torch.tensor(evaluator.energies(groups), dtype=torch.float64)
    own = labels_of(groups, n)
    without = evaluator.energies([exchanged(groups[int(own[i])], (i,), ()) for i in range(n)])
    lost = before[own] - torch.tensor(without, dtype=torch.float64)
    pairs = _candidates(groups, similarity).nonzero()
    extended = evaluator.energies([exchanged(groups[k], (), (i,)) for i, k in pairs.tolist()])
    gains = torch.full((n, len(groups)), -torch.inf, dtype=torch.float64)
    gains[pairs[:, 0], pairs[:, 1]] = torch.tensor(extended, dtype=torch.float64) - before[pairs[:, 1]]
    return gains - lost[:, None]


@dataclass(frozen=True)
class _Step:
    """The adapters `out` of the first cluster change places with those `into` it, from the second."""

    clusters: tuple[int, int]
    out: Group
    into: Group
    gain: float = 0.0


def _proposals(groups: Sequence[Group], gains: Tensor, width: int) -> list[_Step]:
    """The `width` best moves that gain, and the `width` swaps whose two moves gain most (or lose least) together."""
    own = labels_of(groups, len(gains))
    steps = []
    for flat in gains.flatten().argsort(descending=True, stable=True)[:width].tolist():
        i, k = flat // len(groups), flat % len(groups)
        if gains[i, k] > 0:
            steps.append(_Step((int(own[i]), k), (i,), ()))
    offered = gains.max(1).values.argsort(descending=True, stable=True)[:_OFFERED].sort().values
    to = gains[offered][:, own[offered]]  # [i, j] gain of i's move to the cluster of j, −inf for its own
    upper = torch.ones_like(to, dtype=torch.bool).triu(1)
    promised = (to + to.T).masked_fill(~upper, -torch.inf).flatten()
    for flat in promised.argsort(descending=True, stable=True)[:width].tolist():
        if torch.isfinite(promised[flat]):
            i, j = int(offered[flat // len(offered)]), int(offered[flat % len(offered)])
            steps.append(_Step((int(own[i]), int(own[j])), (i,), (j,)))
    return steps


def _verified(evaluator: Evaluator, groups: Sequence[Group], steps: Sequence[_Step], until: float) -> list[_Step]:
    """The steps with their exact gains; not all of them where the time ends before."""
    done: list[_Step] = []
    for start in range(0, len(steps), _SHORTLIST):
        if done and evaluator.spent >= until:
            break
        chunk = steps[start : start + _SHORTLIST]
        sets = []
        for step in chunk:
            a, b = (groups[k] for k in step.clusters)
            sets += [exchanged(a, step.out, step.into), exchanged(b, step.into, step.out), a, b]
        energies = torch.tensor(evaluator.energies(sets), dtype=torch.float64).reshape(-1, 2, 2).sum(2)
        gained = (energies[:, 0] - energies[:, 1]).tolist()
        done += [replace(step, gain=gain) for step, gain in zip(chunk, gained, strict=True)]
    return done


def _bulk_gains(evaluator: Evaluator, groups: Sequence[Group], similarity: Tensor) -> Tensor:
    """[n, K]: what other clusters' bases capture of an adapter, less what its own capture fitted without it."""
    n = evaluator.cores.n
    gains = torch.full((n, len(groups)), -torch.inf, dtype=torch.float64)
    tried = _candidates(groups, similarity)
    left_out = torch.zeros(n, dtype=torch.float64)
    for k, group in enumerate(groups):
        others = tried[:, k].nonzero()[:, 0]
        if not group:
            gains[others, k] = evaluator.cores.weight[others]
            continue
        gains[others, k] = evaluator.cores.captured_by(evaluator.bases(group), others)
        for part in range(min(_PARTS, len(group))):
            held = group[part::_PARTS]
            rest = exchanged(group, held, ())
            if rest:
                left_out[list(held)] = evaluator.cores.captured_by(evaluator.bases(rest), torch.tensor(held))
    return gains - left_out[:, None]
