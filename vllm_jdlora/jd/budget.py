"""Rank and clusters from an error or a byte budget: error curves measured on a few slices, and the choices on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.alternation import Progress
from vllm_jdlora.jd.clustering import probe_slices
from vllm_jdlora.jd.passes import MetricOf, Slices
from vllm_jdlora.jd.problem import FactorSource, SliceProblem
from vllm_jdlora.jd.search import best_assignment
from vllm_jdlora.jd.slice_fit import METHODS

RANKS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
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
_SEARCH_EFFORT = 0.1
_SWEEPS = 4


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
        """Over adapters and slices, each pair alike: what certificates bound. (`relative_squared` goes by norms.)"""
        present = self.squared_norm > 0
        lost = self.squared_error[self.clusters.index(clusters), self.ranks.index(rank)]
        return float((lost[present] / self.squared_norm[present]).mean().sqrt())


def error_curves(
    probes: Sequence[SliceProblem],
    n: int,
    *,
    measured: Sequence[SliceProblem] | None = None,
    clusters: Sequence[int] | None = None,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
    effort: float | None = None,
    progress: Progress | None = None,
) -> ErrorCurves:
    """Group n adapters by the probes, and fit every cluster in the measured slices once, at the largest rank.

    Smaller ranks start from the leading columns of that fit, whose gauge nests them.
    measured: read one at a time (default: the probes, on which the groups look better than elsewhere). clusters:
    ascending, at most n each (default: `cluster_grid`). ranks: ascending. effort: of `best_assignment`.
    progress: called as (stage, done, total) with stages "group" and "measure".
    """
    clusters = tuple(cluster_grid(n) if clusters is None else clusters)
    measured = probes if measured is None else measured
    effort = _SEARCH_EFFORT if effort is None else effort
    report = progress or (lambda stage, done, total: None)
    labels = torch.zeros(len(clusters), n, dtype=torch.int64)
    report("group", 0, len(clusters))
    for row, k in enumerate(clusters):
        rank = _rank_of_search(probes, n, k)
        labels[row] = best_assignment(probes, n, rank, k, seed, lambda *_: None, effort=effort)
        report("group", row + 1, len(clusters))
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
                lost[row, :, members[positions], index] = _lost_by_rank(part, ranks)
        report("measure", index + 1, len(measured))
    return ErrorCurves(clusters, tuple(ranks), labels, lost * squared_norm, squared_norm)


def curves_of(
    source: FactorSource,
    *,
    metric_of: MetricOf | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ErrorCurves:
    """`error_curves` of a collection: grouped on the slices that its own fit takes, measured on `MeasuredSlices`."""
    slices = Slices(source, metric_of)
    probes = probe_slices(slices, seed)
    measured = MeasuredSlices(slices, source.slice_names)
    return error_curves(probes, source.n, measured=measured, seed=seed, progress=progress)


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
    return (1 - torch.stack(kept)).clamp_min(0).cpu()


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
    return min(fitting, key=lambda c: (c.mean_squared_error, c.bytes))


def frontier(curves: ErrorCurves, sizes: Sizes) -> list[Choice]:
    """Choices with every adapter compressed that no other beats in bytes and mean squared error, by bytes."""
    best: list[Choice] = []
    for choice in sorted(choices(curves, sizes), key=lambda c: (c.bytes, c.mean_squared_error)):
        if not best or choice.mean_squared_error < best[-1].mean_squared_error:
            best.append(choice)
    return best


def water_filling(
    lost: Tensor, ranks: Sequence[int], costs: Sequence[Sequence[float]], max_cost: float
) -> tuple[int, ...]:
    """Rank for each slice, [P]: steps of most gain for their cost first, while they fit.

    lost [P, G]: error of each slice at each of the ascending `ranks`; costs [P][G]: bytes there. All slices start at
    the first rank. A step may go up several ranks where gains are not concave.
    Raises JDLoRAError where the first rank everywhere costs more than `max_cost`.
    """
    at = [0] * len(lost)
    spent = sum(cost[0] for cost in costs)
    if spent > max_cost:
        raise JDLoRAError(f"rank {ranks[0]} in every slice takes {spent:.0f}, more than the {max_cost:.0f} allowed")
    table = lost.tolist()

    def steps() -> Iterator[tuple[float, int, int]]:
        for s, now in enumerate(at):
            for then in range(now + 1, len(ranks)):
                cost = costs[s][then] - costs[s][now]
                gain = table[s][now] - table[s][then]
                if gain > 0 and spent + cost <= max_cost:
                    yield gain / cost, s, then

    while (step := max(steps(), default=None)) is not None:
        _, s, then = step
        spent += costs[s][then] - costs[s][at[s]]
        at[s] = then
    return tuple(ranks[i] for i in at)
