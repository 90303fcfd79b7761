"""What a collection would lose at each rank and number of clusters, measured by fits of a few of its slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.jd.alternation import Progress
from vllm_jdlora.jd.clustering import probe_slices, weighted_slices
from vllm_jdlora.jd.diag import fit_diag
from vllm_jdlora.jd.passes import MetricOf
from vllm_jdlora.jd.problem import FactorSource, SliceProblem
from vllm_jdlora.jd.search import best_assignment
from vllm_jdlora.jd.slice_fit import METHODS

RANKS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
DIAGONAL_RANKS = (4, 8, 16, 32, 64)
"""JD-Diag's ranks do not nest: each is a fit of its own."""
_CLUSTERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Errors are measured on so many slices, every projection (q, k, v, …) alike and spread over the layers: among 8 drawn
# at random one projection is easily missing, and mean errors come out up to a quarter too low. Less for large stacks.
_MEASURED, _MEASURED_VALUES = 24, 2**30
# Adapters are grouped for bases of this rank at most: groups that are right for one rank are nearly so for others.
_RANK_OF_SEARCH = 16
_SWEEPS = 4
_DIAGONAL_SWEEPS = 40
# JD-Diag's bases hold its members' own rank-one terms: few, wide clusters share them best. (32 real adapters, 8 bits:
# at 1/16 of the bytes K 1, 2, 4, 8 lose .029, .028, .029, .035 of the output energy; JD-Full's best is .034.)
_MEMBERS_OF_DIAGONAL = 8


def cluster_grid(n: int) -> tuple[int, ...]:
    """Numbers of clusters worth a measurement for n adapters: some up to n/2, and n itself, the SVD of each."""
    return (*(k for k in _CLUSTERS if k <= max(1, n // 2) and k < n), n)


@dataclass(frozen=True)
class ErrorCurves:
    """Squared errors of n adapters in P slices, for every number of clusters C and every rank G of two grids.

    With K = n (each adapter's own SVD) as the last number of clusters, for information.
    """

    clusters: tuple[int, ...]
    ranks: tuple[int, ...]
    labels: Tensor  # [C, n] int64
    squared_error: Tensor  # [C, G, n, P] fp64, ‖ΔW − UΣV‖², in the slices' metric
    squared_norm: Tensor  # [n, P] fp64, ‖ΔW‖²; zero where the adapter has nothing
    method: str = "full"

    @property
    def n(self) -> int:
        return self.squared_norm.shape[0]

    def relative_squared(self) -> Tensor:
        """[C, G, n] fp64: ‖ΔW − UΣV‖²/‖ΔW‖² over the slices together.

        An adapter that none of them holds counts as the worst of the others.
        """
        norm = self.squared_norm.sum(1)
        known = norm > 0
        relative = self.squared_error.sum(3) / norm.where(known, torch.ones_like(norm))
        worst = relative[:, :, known].amax(2, keepdim=True) if known.any() else torch.ones_like(relative[:, :, :1])
        return relative.where(known, worst)

    def root_mean_square(self, clusters: int, rank: int) -> float:
        """Of relative errors over adapters, slices together: what certificates bound. Between ranks by a line."""
        relative = self.relative_squared()[self.clusters.index(clusters)].mean(1)  # [G]
        above = next((g for g, known in enumerate(self.ranks) if known >= rank), len(self.ranks) - 1)
        below = max(0, above - 1) if self.ranks[above] != rank else above
        if self.ranks[below] == self.ranks[above]:
            return float(relative[above].sqrt())
        part = (rank - self.ranks[below]) / (self.ranks[above] - self.ranks[below])
        return float(torch.lerp(relative[below], relative[above], part).sqrt())


def error_curves(
    probes: Sequence[SliceProblem],
    n: int,
    *,
    measured: Sequence[SliceProblem] | None = None,
    clusters: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    method: str = "full",
    seed: int = 0,
    effort: float = 0.0,
    progress: Progress | None = None,
) -> ErrorCurves:
    """Group n adapters by the probes, and fit every cluster in the measured slices once, at the largest rank.

    Smaller ranks start from the leading columns of that fit, whose gauge nests them; those of JD-Diag are fitted apart.
    measured: read one at a time (default: the probes, on which the groups look better than elsewhere). clusters:
    ascending, at most n each (default: `cluster_grid`). ranks: ascending. effort: of `best_assignment`.
    progress: called as (stage, done, total) with stages "group" and "measure".
    """
    if clusters is None:
        clusters = cluster_grid(n) if method == "full" else diagonal_grid(n)
    if ranks is None:
        ranks = RANKS if method == "full" else DIAGONAL_RANKS
    clusters = tuple(clusters)
    measured = probes if measured is None else measured
    report = progress or (lambda stage, done, total: None)
    lost_by_rank = _lost_by_rank if method == "full" else lost_diagonal
    labels = torch.stack(list(groups(probes, n, clusters, seed=seed, effort=effort, progress=report).values()))
    squared_norm = torch.zeros(n, len(measured), dtype=torch.float64)
    lost = torch.zeros(len(clusters), len(ranks), n, len(measured), dtype=torch.float64)
    for index in range(len(measured)):
        problem = measured[index]
        members = problem.members.cpu()
        squared_norm[members, index] = problem.squared_norms.cpu()
        for row in range(len(clusters)):
            own = labels[row][members]
            for label in own.unique():
                positions = (own == label).nonzero()[:, 0]
                part = problem.subset(positions.to(problem.members.device))
                lost[row, :, members[positions], index] = lost_by_rank(part, ranks)
        report("measure", index + 1, len(measured))
    return ErrorCurves(clusters, tuple(ranks), labels, lost * squared_norm, squared_norm, method)


def groups(
    probes: Sequence[SliceProblem],
    n: int,
    clusters: Sequence[int],
    *,
    seed: int = 0,
    effort: float = 0.0,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """K → labels [n] int64 of n adapters, for each of these numbers of clusters. effort: of `best_assignment`."""
    report = progress or (lambda stage, done, total: None)
    report("group", 0, len(clusters))
    found = {}
    for done, k in enumerate(clusters, 1):
        rank = _rank_of_search(probes, n, k)
        found[k] = best_assignment(probes, n, rank, k, seed, lambda *_: None, effort=effort)
        report("group", done, len(clusters))
    return found


def curves_of(
    source: FactorSource,
    *,
    metric_of: MetricOf | None = None,
    method: str = "full",
    seed: int = 0,
    progress: Progress | None = None,
) -> ErrorCurves:
    """`error_curves` of a collection: grouped on the slices that its own fit takes, measured on `measured_slices`."""
    probes = probe_slices(weighted_slices(source, metric_of, seed), seed)
    measured = measured_slices(source, metric_of, seed)
    return error_curves(probes, source.n, measured=measured, method=method, seed=seed, progress=progress)


def measured_slices(source: FactorSource, metric_of: MetricOf | None, seed: int) -> MeasuredSlices:
    """The slices of a collection that errors are predicted from."""
    return MeasuredSlices(weighted_slices(source, metric_of, seed), source.slice_names)


class MeasuredSlices(Sequence[SliceProblem]):
    """Up to 24 of the slices, stacked anew at each access: of each projection as many, evenly spread over layers."""

    def __init__(self, slices: Sequence[SliceProblem], names: Sequence[str]) -> None:
        by_projection: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            by_projection.setdefault(name.rpartition(".")[2], []).append(index)
        values = slices[0].bt.numel() + slices[0].a.numel()
        each = max(1, min(_MEASURED, _MEASURED_VALUES // max(1, values)) // len(by_projection))
        self.indices: list[int] = []
        for group in by_projection.values():
            count = min(each, len(group))
            self.indices += [group[int((i + 0.5) * len(group) / count)] for i in range(count)]
        self._slices = slices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> SliceProblem:  # type: ignore[override]
        return self._slices[self.indices[index]]


def diagonal_grid(n: int) -> tuple[int, ...]:
    """Numbers of clusters worth a measurement for JD-Diag of n adapters."""
    return tuple(k for k in _CLUSTERS if k == 1 or k * _MEMBERS_OF_DIAGONAL <= n)


def _rank_of_search(probes: Sequence[SliceProblem], n: int, clusters: int) -> int:
    """Below what holds a whole cluster: bases that lose nothing cannot tell who belongs where."""
    rows = max((probe.rows for probe in probes), default=0)
    return max(1, min(_RANK_OF_SEARCH, rows // n, rows // (2 * clusters)))


def _lost_by_rank(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """[G, m] fp64: relative squared error of one cluster's members at each rank, from one fit at the largest.

    One Gauss–Seidel sweep from the leading columns: alone they lose 7 % more than a fit of their rank does on related
    adapters, and 25 % more on random ones.
    """
    most = min(max(ranks), problem.rows, problem.bt.shape[1], problem.a.shape[1])
    u, v = METHODS["full"].fit(problem, most, None, _SWEEPS)
    z_all, t_all = problem.times(u.to(problem.bt), v.to(problem.a).T)
    kept = []
    for rank in ranks:
        z, t = z_all[:, :rank], t_all[:, :rank]
        if rank < most:
            z = problem.bt @ torch.linalg.qr(problem.gram_step_out(z, t)).Q
            t = problem.a @ torch.linalg.qr(problem.gram_step_in(z, t)).Q
        kept.append(problem.energies(z, t))
    return (1 - torch.stack(kept) / problem.importance).clamp_min(0).cpu()


def lost_diagonal(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """The same of JD-Diag, each rank fitted."""
    kept = []
    for rank in ranks:
        fit = fit_diag(problem, rank, max_sweeps=_DIAGONAL_SWEEPS)
        kept.append(METHODS["diag"].captured(problem, fit.u[None], fit.v[None])[:, 0])
    return (1 - torch.stack(kept) / problem.importance).clamp_min(0).cpu()
