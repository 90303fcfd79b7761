"""Drift: how much worse a collection's bases fit the adapters that arrive, and what a rebuild would gain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.arrivals import Projections, factors_of
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.members import surrogate
from vllm_jdlora.collection.own_metric import MetricOfSlice, in_metric, orthonormal, seen_by_cluster
from vllm_jdlora.collection.schema import METRIC_ERRORS
from vllm_jdlora.jd.passes import mean_energies
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.slice_fit import METHODS
from vllm_jdlora.known_mean import mean_of_known

# Arrivals that fit about as well as the stored adapters give no reason to look further.
_MARGIN = 1.1
# A rebuild changes every Σ and every prefix-cache key: it should gain at least this share of the mean error.
_WORTH = 0.05
_PROBES = 4
_PROBE_SWEEPS = 4


@dataclass(frozen=True)
class ClusterDrift:
    """One cluster that takes arrivals; errors are means, of the kind that the drift is about."""

    cluster: int
    stored: int
    arrivals: int
    stored_error: float | None
    arrivals_error: float


@dataclass(frozen=True)
class Drift:
    """Mean errors (not squared) of stored adapters (None: not known) and arrivals; the last two of all together.

    ``kind`` says which: of the collection's metric where its moments are at hand, else the relative error.
    ``after_rebuild`` is an estimate from refits of a few slices; both are None where no refit was tried: the arrivals
    ``fit`` as well as the stored adapters, or the metric in which a rebuild would fit is not at hand.
    """

    stored_error: float | None
    arrivals_error: float
    clusters: tuple[ClusterDrift, ...]
    before_rebuild: float | None = None
    after_rebuild: float | None = None
    kind: str = METRIC_ERRORS["frobenius"]

    @property
    def fit(self) -> bool:
        return self.stored_error is not None and self.arrivals_error <= _MARGIN * self.stored_error

    @property
    def rebuild_pays(self) -> bool:
        return (
            self.before_rebuild is not None
            and self.after_rebuild is not None
            and self.after_rebuild < (1 - _WORTH) * self.before_rebuild
        )

    def told(self) -> str:
        """One line for people."""
        stored = "not known" if self.stored_error is None else f"{self.stored_error:.3f}"
        line = f"drift: {self.kind} of new adapters {self.arrivals_error:.3f} (mean), of the stored ones {stored}"
        if self.before_rebuild is None or self.after_rebuild is None:
            why = "they fit the bases" if self.fit else "without second moments a rebuild cannot be estimated"
            return f"{line}: {why}"
        change = f"a rebuild would change the mean error of all from {self.before_rebuild:.3f} to about "
        return f"{line}; {change}{self.after_rebuild:.3f}: {'it pays' if self.rebuild_pays else 'it does not pay yet'}"


def drift(
    collection: Collection,
    arrivals: Sequence[Adapter],
    found: Projections,
    *,
    originals: Mapping[str, Adapter] | None = None,
    metrics: MetricOfSlice | None = None,
) -> Drift:
    """How the arrivals fit, and what a refit of the clusters that take them would give.

    found: the arrivals on the collection's bases. originals: stored adapters whose uncompressed form is at hand; the
    others stand in the probe refits as their UΣV, whose old error is added in quadrature. metrics: what `found` was
    projected in. Slices of the probe refits are spread evenly over the model. Stored adapters whose error in the
    metric is not known (they were added without moments) do not count.
    """
    entries = collection.manifest.adapters
    stored = [entry.relative_error if metrics is None else entry.output_error for entry in entries]
    labels = torch.tensor([entry.cluster for entry in entries])
    of_cluster: defaultdict[int, list[float | None]] = defaultdict(list)
    for entry, error in zip(entries, stored, strict=True):
        of_cluster[entry.cluster].append(error)
    clusters = tuple(
        ClusterDrift(
            cluster=k,
            stored=len(of_cluster[k]),
            arrivals=int((found.cluster == k).sum()),
            stored_error=mean_of_known(of_cluster[k]),
            arrivals_error=float(found.judged[found.cluster == k].mean()),
        )
        for k in found.cluster.unique().tolist()
    )
    own = collection.manifest.metric
    result = Drift(
        mean_of_known(stored),
        float(found.judged.mean()),
        clusters,
        kind=METRIC_ERRORS["frobenius" if metrics is None else own],
    )
    if result.fit or (metrics is None and own != "frobenius"):
        return result
    now, then = _probed(collection, arrivals, found, originals or {}, labels, metrics)
    mean = mean_of_known([*stored, *found.judged.tolist()])
    assert mean is not None, "there are arrivals"
    # A few slices may be better or worse than most: only their ratio is used.
    return replace(result, before_rebuild=mean, after_rebuild=mean * then / now)


def _probed(
    collection: Collection,
    arrivals: Sequence[Adapter],
    found: Projections,
    originals: Mapping[str, Adapter],
    labels: Tensor,
    metrics: MetricOfSlice | None,
) -> tuple[float, float]:
    """Mean error of all adapters over the probe slices: today, and after a refit of the changed clusters."""
    slices, entries = collection.manifest.slices, collection.manifest.adapters
    n, method = len(entries), METHODS[collection.manifest.method]
    before = (collection.slice_errors(), found.slice_errors)
    in_it = (collection.slice_output_errors(), found.slice_output_errors)
    if metrics is not None and in_it[0] is not None and in_it[1] is not None:
        before = (in_it[0], in_it[1])
    today_by_slice = torch.cat(before).double().square()
    step = max(1, len(slices) // _PROBES)
    norms, now, then = (torch.zeros(n + len(arrivals), dtype=torch.float64) for _ in range(3))
    everyone = torch.cat([labels, found.cluster])
    changed = found.cluster.unique().tolist()
    metric, probes = None, []
    for m in range(0, len(slices), step)[:_PROBES]:
        name = slices[m].name
        u, v = collection.basis(name)
        known = [
            originals[e.name].factors(name) if e.name in originals else surrogate(collection, row, m, u, v)
            for row, e in enumerate(entries)
        ]
        factors = [None if pair is None else Factors(*pair) for pair in known] + factors_of(arrivals, name)
        metric, problem = in_metric(metrics, name, SliceProblem.from_factors(factors, name))
        probes.append((m, problem, *orthonormal(*seen_by_cluster(metric, u, v))))
    absolute = metric is not None and metric.absolute
    energies = mean_energies((problem for _, problem, _, _ in probes), len(everyone), absolute=absolute)
    for m, problem, u, v in probes:
        problem = problem.in_shares_of(energies)
        at = problem.members
        # NaN where an error is not known: such adapters take part in the refits and not in the means.
        today = today_by_slice[at, m]
        # UΣV holds 1 − e² of its original's squared norm.
        stands_in = torch.tensor([i < n and entries[i].name not in originals for i in at.tolist()])
        whole = problem.squared_norms / torch.where(stands_in, (1 - today).clamp_min(0.01), 1.0)
        lost = today.clone()
        for k in changed:
            positions = (everyone[at] == k).nonzero()[:, 0]
            members = problem.subset(positions)
            bases = method.fit(members, u.shape[2], (u[k], v[k]), _PROBE_SWEEPS)
            left = method.refit(members, *bases)[1] / members.squared_norms
            own = today[positions]
            lost[positions] = torch.where(stands_in[positions], own + (1 - own) * left, left + 0 * own).clamp_min(0)
        norms[at] += whole
        now[at] += today * whole
        then[at] += lost * whole
    present = (norms > 0) & ~now.isnan() & ~then.isnan()
    return tuple(float((x[present] / norms[present]).sqrt().mean()) for x in (now, then))  # type: ignore[return-value]
