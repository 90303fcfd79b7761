"""Method, rank and clusters from a byte budget: what fills it is measured on a few slices, and the worst is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Progress
from vllm_jdlora.jd.budget import Choice, Sizes, best_of
from vllm_jdlora.jd.clustering import probe_slices
from vllm_jdlora.jd.error_curves import (
    DIAGONAL_RANKS,
    RANKS,
    cluster_grid,
    diagonal_grid,
    groups,
    lost_diagonal,
    lost_full,
    parts,
)
from vllm_jdlora.jd.measured_slices import MeasuredSlices, clusters_by_slice, filled, measured_slices
from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.problem import SliceProblem

# A candidate that loses so many times what the best one does on the slices measured so far, of each projection one at
# least, is not measured on.
_HOPELESS = 1.2


@dataclass(frozen=True)
class _Method:
    grid: Callable[[int], Sequence[int]]  # adapters -> numbers of clusters worth a measurement
    ranks: tuple[int, int]  # the least and the most that are chosen
    lost: Callable[[SliceProblem, Sequence[int]], Tensor]


_METHODS: Mapping[str, _Method] = {
    "full": _Method(lambda n: cluster_grid(n)[:-1] or (1,), (RANKS[0], RANKS[-1]), lost_full),
    "diag": _Method(diagonal_grid, (2, DIAGONAL_RANKS[-1]), lost_diagonal),
}


@dataclass(frozen=True)
class Candidate:
    """A method at the largest rank that the bytes hold for a number of clusters: error only falls with rank."""

    method: str
    rank: int
    clusters: int
    bytes: int


def candidates(sizes: Mapping[str, Sizes], max_bytes: int) -> list[Candidate]:
    """What is worth a measurement: by method in `sizes`, for each number of clusters of its grid the largest rank.

    Of several that hold the highest rank of all only that with the most clusters: more clusters of the same rank lose
    less. Raises JDLoRAError where nothing fits.
    """
    found: list[Candidate] = []
    for method, size in sizes.items():
        least, most = _METHODS[method].ranks
        fitting: list[Candidate] = []
        for k in _METHODS[method].grid(size.n):
            ranks = [r for r in range(least, most + 1) if size.total(k, r) <= max_bytes]
            if ranks:
                fitting.append(Candidate(method, ranks[-1], k, size.total(k, ranks[-1])))
        highest = [c for c in fitting if c.rank == most]
        found += [c for c in fitting if c.rank < most or c == highest[-1]]
    if not found:
        smallest, rank = min((size.total(1, _METHODS[m].ranks[0]), _METHODS[m].ranks[0]) for m, size in sizes.items())
        raise JDLoRAError(
            f"{max_bytes} bytes are too few for {next(iter(sizes.values())).n} adapters: the smallest choice (rank "
            f"{rank}, 1 clusters) takes {smallest}"
        )
    return found


def cheapest_loss(
    slices: Slices, sizes: Mapping[str, Sizes], max_bytes: int, *, seed: int = 0, progress: Progress | None = None
) -> Choice:
    """Method, rank and clusters of the least mean squared relative error in `max_bytes`; see `best_of`.

    slices: `weighted_slices` of the collection. sizes: by method, for those to choose from ("full", "diag").
    progress: stages "group" and "measure". Raises JDLoRAError where nothing fits.
    """
    tried = candidates(sizes, max_bytes)
    grid = sorted({candidate.clusters for candidate in tried})
    probes = probe_slices(slices, seed)
    labels = groups(probes, slices.n, grid, seed=seed, progress=progress)
    enough = {k: max(_largest_sum(probe, labels[k]) for probe in probes) for k in grid}
    tried = [
        replace(c, rank=enough[c.clusters], bytes=sizes[c.method].total(c.clusters, enough[c.clusters]))
        if enough[c.clusters] < c.rank
        else c
        for c in tried
    ]
    return best_of(compared(measured_slices(slices), slices.n, tried, labels, progress))


def _largest_sum(probe: SliceProblem, labels: Tensor) -> int:
    """The largest sum of the members' ranks in any cluster: bases of this rank lose nothing."""
    ranks = torch.tensor(probe.ranks, dtype=torch.int64)
    sums = torch.zeros(int(labels.max()) + 1, dtype=torch.int64).index_add_(0, labels[probe.members.cpu()], ranks)
    return max(1, int(sums.max()))


def compared(
    measured: MeasuredSlices | Sequence[SliceProblem],
    n: int,
    tried: Sequence[Candidate],
    labels: Mapping[int, Tensor],
    progress: Progress | None = None,
) -> list[Choice]:
    """The candidates with the errors that fits on the measured slices have, each slice read once.

    labels: K → [n] int64, for every K. Those that are much worse than the best of all are dropped on the way: the
    choices of those that are left, in their order. progress: stage "measure".
    """
    report = progress or (lambda stage, done, total: None)
    first = measured.projections if isinstance(measured, MeasuredSlices) else len(measured)
    norm = torch.zeros(n, len(measured), dtype=torch.float64)
    running = [_Running(candidate, labels[candidate.clusters], norm) for candidate in tried]
    for index in range(len(measured)):
        problem = measured[index]
        norm[problem.members.cpu(), index] = problem.squared_norms.cpu()
        for each in running:
            each.measure(problem, index)
        if running and index + 1 >= first:
            errors = [float(each.relative(index + 1).mean()) for each in running]
            least = min(errors)
            running = [each for each, error in zip(running, errors, strict=True) if error <= _HOPELESS * least]
        report("measure", index + 1, len(measured))
    return [each.choice() for each in running]


@dataclass
class _Running:
    """A candidate and what it lost so far."""

    candidate: Candidate
    labels: Tensor  # [n]
    norm: Tensor  # [n, P] squared norms, filled in by the caller
    lost: Tensor = field(init=False)  # [n, P] relative squared errors
    known: Tensor = field(init=False)  # [n, P]

    def __post_init__(self) -> None:
        self.lost = torch.zeros_like(self.norm)
        self.known = torch.zeros_like(self.norm, dtype=torch.bool)
        self._fitted = clusters_by_slice(self.labels, self.norm.shape[1])

    def measure(self, problem: SliceProblem, index: int) -> None:
        members = problem.members.cpu()
        for positions, part in parts(problem, self.labels, self._fitted[index]):
            at = members[positions]
            self.lost[at, index] = _METHODS[self.candidate.method].lost(part, [self.candidate.rank])[0]
            self.known[at, index] = True

    def relative(self, slices: int) -> Tensor:
        """[n'] relative squared errors over the first slices together, of the adapters that these hold."""
        norm = self.norm[:, :slices]
        total = norm.sum(1)
        held = total > 0
        error = (filled(self.lost[:, :slices], self.known[:, :slices]) * norm).sum(1)
        return error[held] / total[held]

    def choice(self) -> Choice:
        squared = self.relative(self.norm.shape[1])
        errors = squared.sqrt()
        return Choice(
            rank=self.candidate.rank,
            clusters=self.candidate.clusters,
            bytes=self.candidate.bytes,
            mean_error=float(errors.mean()),
            max_error=float(errors.max()),
            mean_squared_error=float(squared.mean()),
            method=self.candidate.method,
            cluster=self.labels,
        )
