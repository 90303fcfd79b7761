"""Method, rank and clusters from an error or a byte budget: errors measured on a few slices, and choices by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
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
MARGIN = 0.1
"""Share by which an adapter's relative error over all slices may exceed its prediction from a few.

32 real adapters, 90 slices: 95 % are within 1.09 of the prediction from 24 slices, 99 % within 1.14.
"""
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
# What a token costs goes with the rank: of choices that lose at most this much more than the least, the lowest rank.
_AS_GOOD = 1.05


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
    lost_by_rank = _lost_by_rank if method == "full" else _lost_diagonal
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


def _lost_diagonal(problem: SliceProblem, ranks: Sequence[int]) -> Tensor:
    """The same of JD-Diag, each rank fitted."""
    kept = []
    for rank in ranks:
        fit = fit_diag(problem, rank, max_sweeps=_DIAGONAL_SWEEPS)
        kept.append(METHODS["diag"].captured(problem, fit.u[None], fit.v[None])[:, 0])
    return (1 - torch.stack(kept) / problem.importance).clamp_min(0).cpu()


@dataclass(frozen=True)
class Sizes:
    """What n adapters take as stored tensors, in bytes."""

    slices: tuple[tuple[int, int], ...]  # (d_out, d_in)
    plain: tuple[int, ...]  # [n] bytes of each adapter's A and B, kept uncompressed
    basis_width: float = 2  # bytes of a number of U or V
    sigma_width: float = 2  # bytes of a number of Σ
    scale_width: float = 0  # bytes of the scale that each direction of a basis in 8 bits has
    diagonal: bool = False  # Σ as R numbers (JD-Diag), not R × R
    always_plain: int = 0  # bytes of adapters that cannot be compressed

    @property
    def n(self) -> int:
        return len(self.plain)

    @property
    def uncompressed(self) -> int:
        """Bytes if nothing were compressed."""
        return sum(self.plain) + self.always_plain

    def bases(self, clusters: int, rank: int) -> int:
        """K · R · Σ_slices (d_out + d_in) numbers, and their scales."""
        direction = sum((d_out + d_in) * self.basis_width + 2 * self.scale_width for d_out, d_in in self.slices)
        return math.ceil(clusters * rank * direction)

    def scaling(self, rank: int) -> int:
        """Bytes for each further adapter: R × R numbers in each slice."""
        return math.ceil(len(self.slices) * (rank if self.diagonal else rank**2) * self.sigma_width)

    def total(self, clusters: int, rank: int, plain: Sequence[int] = ()) -> int:
        """Bases, Σ of all adapters but those at the positions `plain`, and these uncompressed."""
        kept = sum(self.plain[i] for i in plain) + self.always_plain
        return self.bases(clusters, rank) + (self.n - len(plain)) * self.scaling(rank) + kept


@dataclass(frozen=True)
class Choice:
    """Rank and clusters, what they take, and the errors predicted for the adapters that are compressed.

    `mean_error` and `max_error` are relative errors (not squared), `mean_squared_error` is what the paper reports.
    """

    rank: int
    clusters: int
    bytes: int
    mean_error: float
    max_error: float
    mean_squared_error: float
    method: str = "full"
    plain: tuple[int, ...] = ()  # positions of the adapters that are better kept uncompressed
    cluster: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False, compare=False)  # [n] on the probes


def choices(curves: ErrorCurves, sizes: Sizes, max_error: float | None = None, margin: float = 0.0) -> list[Choice]:
    """Every (K, R) of the curves' grids but K = n, where at least as many adapters as clusters are compressed.

    max_error: adapters whose predicted relative error, times 1 + margin, is above it are kept plain.
    """
    relative = curves.relative_squared()
    out = []
    for row, k in enumerate(curves.clusters):
        if k == curves.n > 1:
            continue
        for column, rank in enumerate(curves.ranks):
            squared = relative[row, column]
            kept = squared.sqrt() * (1 + margin) <= (math.inf if max_error is None else max_error)
            if int(kept.sum()) >= k:
                plain = tuple((~kept).nonzero()[:, 0].tolist())
                errors = squared[kept].sqrt()
                out.append(
                    Choice(
                        rank=rank,
                        clusters=k,
                        bytes=sizes.total(k, rank, plain),
                        mean_error=float(errors.mean()),
                        max_error=float(errors.max()),
                        mean_squared_error=float(squared[kept].mean()),
                        method=curves.method,
                        plain=plain,
                        cluster=curves.labels[row],
                    )
                )
    return out


def choose_for_error(curves: ErrorCurves, sizes: Sizes, max_error: float, *, margin: float = MARGIN) -> Choice:
    """The fewest bytes that keep every adapter's predicted relative error (not squared) at most `max_error`.

    Adapters above it are kept plain and their plain bytes count: a few hard ones do not set everyone's rank.
    Raises JDLoRAError where nothing takes fewer bytes than the adapters themselves.
    """
    best = min(
        choices(curves, sizes, max_error, margin), key=lambda c: (c.bytes, c.mean_squared_error), default=None
    )  # fmt: skip
    if best is None or best.bytes >= sizes.uncompressed:
        smaller = [c.max_error for c in choices(curves, sizes) if c.bytes < sizes.uncompressed]
        reached = (
            f"; with every adapter compressed, {min(smaller):.3f} can be reached in fewer bytes" if smaller else ""
        )
        raise JDLoRAError(
            f"no rank and clusters keep adapters under a relative error of {max_error:g} in fewer bytes than the "
            f"adapters themselves{reached}: allow more error, or serve them as they are"
        )
    return best


def choose_for_bytes(curves: ErrorCurves, sizes: Sizes, max_bytes: int) -> Choice:
    """The least mean squared relative error with every adapter compressed and at most `max_bytes` in all.

    Raises JDLoRAError where even the smallest choice is larger.
    """
    everything = choices(curves, sizes)
    fitting = [c for c in everything if c.bytes <= max_bytes]
    if not fitting:
        smallest = min(everything, key=lambda c: c.bytes)
        raise JDLoRAError(
            f"{max_bytes} bytes are too few for {sizes.n} adapters: the smallest choice (rank {smallest.rank}, "
            f"{smallest.clusters} clusters) takes {smallest.bytes}"
        )
    best = min(fitting, key=lambda c: (c.mean_squared_error, c.bytes))
    rank = _filled(curves.ranks, sizes, best.clusters, best.rank, max_bytes)
    return replace(best, rank=rank, bytes=sizes.total(best.clusters, rank))


def _filled(ranks: Sequence[int], sizes: Sizes, clusters: int, rank: int, max_bytes: int) -> int:
    """The largest rank from this one to the next of the grid's that still fits: error only falls with rank."""
    above = [r for r in ranks if r > rank]
    while rank + 1 < (above[0] if above else rank + 1) and sizes.total(clusters, rank + 1) <= max_bytes:
        rank += 1
    return rank


def _worth_it(grid: Sequence[int], sizes: Sizes, max_bytes: int, ranks: Sequence[int]) -> list[int]:
    """Numbers of clusters of which the bytes hold the lowest rank, and the highest fills half of them at least."""
    fitting = [k for k in grid if sizes.total(k, ranks[0]) <= max_bytes and (k < sizes.n or k == 1)]
    return [k for k in fitting if 2 * sizes.total(k, ranks[-1]) >= max_bytes] or fitting[-1:] or list(grid[:1])


def diagonal_choices(
    measured: Sequence[SliceProblem],
    labels: Mapping[int, Tensor],
    sizes: Sizes,
    max_bytes: int,
    progress: Progress | None = None,
) -> list[Choice]:
    """JD-Diag at the largest rank that `max_bytes` hold, for each number of clusters in `labels` (K → [n] int64).

    Measured by fits on the slices given. Ranks above 64 and below 2 are left out. progress: stage "measure JD-Diag".
    """
    tried = []
    for k in labels:
        fitting = [r for r in range(2, DIAGONAL_RANKS[-1] + 1) if sizes.total(k, r) <= max_bytes]
        tried += [(k, fitting[-1])] if fitting else []
    report = progress or (lambda stage, done, total: None)
    norm = torch.zeros(sizes.n, dtype=torch.float64)
    lost = torch.zeros(len(tried), sizes.n, dtype=torch.float64)
    for index in range(len(measured) if tried else 0):
        problem = measured[index]
        members = problem.members.cpu()
        norm[members] += problem.squared_norms.cpu()
        for row, (k, rank) in enumerate(tried):
            own = labels[k][members]
            for label in own.unique():
                positions = (own == label).nonzero()[:, 0]
                part = problem.subset(positions.to(problem.members.device))
                lost[row, members[positions]] += _lost_diagonal(part, [rank])[0] * part.squared_norms.cpu()
        report("measure JD-Diag", index + 1, len(measured))
    known = norm > 0
    out = []
    for (k, rank), error in zip(tried, lost, strict=True):
        squared = error[known] / norm[known]
        errors = squared.sqrt()
        out.append(
            Choice(
                rank=rank,
                clusters=k,
                bytes=sizes.total(k, rank),
                mean_error=float(errors.mean()),
                max_error=float(errors.max()),
                mean_squared_error=float(squared.mean()),
                method="diag",
                cluster=labels[k],
            )
        )
    return out


def best_of(choices: Sequence[Choice]) -> Choice:
    """The least mean squared error; of those nearly as good (5 %) the lowest rank."""
    least = min(choice.mean_squared_error for choice in choices)
    near = [choice for choice in choices if choice.mean_squared_error <= _AS_GOOD * least]
    return min(near, key=lambda choice: (choice.rank, choice.mean_squared_error))


def frontier(curves: ErrorCurves, sizes: Sizes) -> list[Choice]:
    """Choices with every adapter compressed that no other beats in bytes and mean squared error, by bytes."""
    best: list[Choice] = []
    for choice in sorted(choices(curves, sizes), key=lambda c: (c.bytes, c.mean_squared_error)):
        if not best or choice.mean_squared_error < best[-1].mean_squared_error:
            best.append(choice)
    return best


def cheapest_loss(
    source: FactorSource,
    sizes: Mapping[str, Sizes],
    max_bytes: int,
    *,
    metric_of: MetricOf | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Method, rank and clusters of the least mean squared relative error in `max_bytes`; see `best_of`.

    sizes: by method, for those to choose from ("full", "diag"). Raises JDLoRAError where nothing fits.
    """
    measured = measured_slices(source, metric_of, seed)
    probes = probe_slices(weighted_slices(source, metric_of, seed), seed)
    found: list[Choice] = []
    refused: JDLoRAError | None = None
    if "full" in sizes:
        grid = _worth_it(cluster_grid(source.n), sizes["full"], max_bytes, RANKS)
        curves = error_curves(probes, source.n, measured=measured, clusters=grid, seed=seed, progress=progress)
        try:
            found.append(choose_for_bytes(curves, sizes["full"], max_bytes))
        except JDLoRAError as error:
            refused = error
    if "diag" in sizes:
        grid = _worth_it(diagonal_grid(source.n), sizes["diag"], max_bytes, DIAGONAL_RANKS)
        labels = groups(probes, source.n, grid, seed=seed, progress=progress)
        found += diagonal_choices(measured, labels, sizes["diag"], max_bytes, progress)
    if not found:
        smallest = min(sizes.values(), key=lambda size: size.total(1, 2))
        raise refused or JDLoRAError(
            f"{max_bytes} bytes are too few for {source.n} adapters: rank 2 in one cluster takes {smallest.total(1, 2)}"
        )
    return best_of(found)
