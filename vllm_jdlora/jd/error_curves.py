"""What a collection would lose at each rank and number of clusters, measured by fits of a few of its slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.jd.alternation import Progress
from vllm_jdlora.jd.clustering import probe_slices
from vllm_jdlora.jd.cores import leading_directions
from vllm_jdlora.jd.diag import captured_diag, fit_diag
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.measured_slices import clusters_by_slice, filled, measured_slices
from vllm_jdlora.jd.passes import Slices
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.search import Search

RANKS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
DIAGONAL_RANKS = (4, 8, 16, 32, 64)
"""JD-Diag's ranks do not nest: each is a fit of its own."""
_CLUSTERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Adapters are grouped for bases of this rank at most: groups that are right for one rank are nearly so for others.
_RANK_OF_SEARCH = 16
_SWEEPS = 4
_RANGE_STEPS = 2
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
    """Group n adapters by the probes, and fit their clusters in the measured slices, once, at the largest rank.

    Of many adapters each cluster is fitted in some of these slices (`clusters_by_slice`), and the rest is `filled`.
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
    lost_by_rank = lost_full if method == "full" else lost_diagonal
    labels = torch.stack(list(groups(probes, n, clusters, seed=seed, effort=effort, progress=report).values()))
    fitted = [clusters_by_slice(each, len(measured)) for each in labels]
    squared_norm = torch.zeros(n, len(measured), dtype=torch.float64)
    lost = torch.zeros(len(clusters), len(ranks), n, len(measured), dtype=torch.float64)
    known = torch.zeros(len(clusters), n, len(measured), dtype=torch.bool)
    for index in range(len(measured)):
        problem = measured[index]
        members = problem.members.cpu()
        squared_norm[members, index] = problem.squared_norms.cpu()
        for row, k in enumerate(clusters):
            if k == n and method == "full":
                lost[row, :, members, index] = _lost_alone(problem, ranks)
                known[row, members, index] = True
                continue
            for positions, part in parts(problem, labels[row], fitted[row][index]):
                lost[row, :, members[positions], index] = lost_by_rank(part, ranks)
                known[row, members[positions], index] = True
        report("measure", index + 1, len(measured))
    lost = torch.stack([filled(each, seen) for each, seen in zip(lost, known, strict=True)])
    return ErrorCurves(clusters, tuple(ranks), labels, lost * squared_norm, squared_norm, method)


def parts(problem: SliceProblem, labels: Tensor, clusters: Sequence[int]) -> Iterator[tuple[Tensor, SliceProblem]]:
    """(positions [m'], those members alone) for each of these clusters of the labels [n] that the slice holds."""
    own = labels[problem.members.cpu()]
    for label in clusters:
        positions = (own == label).nonzero()[:, 0]
        if len(positions):
            yield positions, problem.subset(positions.to(problem.members.device))


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
    found, search = {}, Search(probes, n, seed)
    for done, k in enumerate(clusters, 1):
        rank = _rank_of_search(probes, n, k)
        found[k] = search.assignment(rank, k, lambda *_: None, effort=effort)
        report("group", done, len(clusters))
    return found


def curves_of(slices: Slices, *, method: str = "full", seed: int = 0, progress: Progress | None = None) -> ErrorCurves:
    """`error_curves` of a collection's `weighted_slices`: grouped on the probes, measured on `measured_slices`."""
    probes, measured = probe_slices(slices, seed), measured_slices(slices)
    return error_curves(probes, slices.n, measured=measured, method=method, seed=seed, progress=progress)


def diagonal_grid(n: int) -> tuple[int, ...]:
    """Numbers of clusters worth a measurement for JD-Diag of n adapters."""
    return tuple(k for k in _CLUSTERS if k == 1 or k * _MEMBERS_OF_DIAGONAL <= n)


def _rank_of_search(probes: Sequence[SliceProblem], n: int, clusters: int) -> int:
    """Below what holds a whole cluster: bases that lose nothing cannot tell who belongs where."""
    rows = max((probe.rows for probe in probes), default=0)
    return max(1, min(_RANK_OF_SEARCH, rows // n, rows // (2 * clusters)))


def lost_full(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """[G, m] fp64: relative squared error of one cluster's members at each rank, from one fit at the largest.

    One Gauss–Seidel sweep from the leading columns: alone they lose 7 % more than a fit of their rank does on related
    adapters, and 25 % more on random ones.
    """
    most = min(max(ranks), problem.rows, problem.bt.shape[1], problem.a.shape[1])
    fit = fit_full(problem, most, max_sweeps=_SWEEPS, range_steps=_RANGE_STEPS)
    z_all, t_all = problem.times(fit.u.to(problem.bt), fit.v.to(problem.a).T)
    kept = []
    for rank in ranks:
        z, t = z_all[:, :rank], t_all[:, :rank]
        if rank < most:
            z = problem.bt @ torch.linalg.qr(problem.gram_step_out(z, t)).Q
            t = problem.a @ torch.linalg.qr(problem.gram_step_in(z, t)).Q
        kept.append(problem.energies(z, t))
    return _lost(problem, kept)


def lost_diagonal(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """The same of JD-Diag, each rank fitted."""
    kept = []
    for rank in ranks:
        fit = fit_diag(problem, rank, max_sweeps=_DIAGONAL_SWEEPS)
        kept.append(captured_diag(problem, fit.u[None], fit.v[None])[:, 0])
    return _lost(problem, kept)


def _lost_alone(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """The same of each member's own truncated SVD."""
    energy = leading_directions(problem)[0].double().square().sum(2)  # [m, ρ]
    return _lost(problem, [energy[:, :rank].sum(1).to(problem.importance) for rank in ranks])


def _lost(problem: SliceProblem, kept: Sequence[Tensor]) -> Tensor:
    return (1 - torch.stack(list(kept)) / problem.importance).clamp_min(0).cpu()
