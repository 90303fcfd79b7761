"""Drift: how much worse a collection's bases fit the adapters that arrive, and what a rebuild would gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.arrivals import Projections, factors_of
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.members import surrogate
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem

# Arrivals that fit about as well as the stored adapters give no reason to look further.
_MARGIN = 1.1
# A rebuild changes every Σ and every prefix-cache key: it should gain at least this share of the mean error.
_WORTH = 0.05
_PROBES = 4
_PROBE_SWEEPS = 4


@dataclass(frozen=True)
class ClusterDrift:
    """One cluster that takes arrivals; errors are means of relative errors (not squared)."""

    cluster: int
    stored: int
    arrivals: int
    stored_error: float | None
    arrivals_error: float


@dataclass(frozen=True)
class Drift:
    """Mean relative errors (not squared) of stored adapters and arrivals; the last two of all of them together.

    ``after_rebuild`` is an estimate from refits of a few slices; both are None where the arrivals fit as well as the
    stored adapters and no refit was tried.
    """

    stored_error: float
    arrivals_error: float
    clusters: tuple[ClusterDrift, ...]
    before_rebuild: float | None = None
    after_rebuild: float | None = None

    @property
    def rebuild_pays(self) -> bool:
        return (
            self.before_rebuild is not None
            and self.after_rebuild is not None
            and self.after_rebuild < (1 - _WORTH) * self.before_rebuild
        )

    def told(self) -> str:
        """One line for people."""
        line = (
            f"drift: relative error of new adapters {self.arrivals_error:.3f} (mean), of the stored ones "
            f"{self.stored_error:.3f}"
        )
        if self.before_rebuild is None or self.after_rebuild is None:
            return f"{line}: they fit the bases"
        change = f"a rebuild would change the mean error of all from {self.before_rebuild:.3f} to about "
        return f"{line}; {change}{self.after_rebuild:.3f}: {'it pays' if self.rebuild_pays else 'it does not pay yet'}"


def drift(
    collection: Collection,
    arrivals: Sequence[Adapter],
    found: Projections,
    *,
    originals: Mapping[str, Adapter] | None = None,
) -> Drift:
    """How the arrivals fit, and what a refit of the clusters that take them would give.

    found: the arrivals on the collection's bases. originals: stored adapters whose uncompressed form is at hand; the
    others stand in the probe refits as their UΣV, whose old error is added in quadrature. Slices of the probe refits
    are spread evenly over the model; in a JD-Diag collection none is tried.
    """
    entries = collection.manifest.adapters
    stored = torch.tensor([entry.relative_error for entry in entries], dtype=torch.float64)
    labels = torch.tensor([entry.cluster for entry in entries])
    clusters = tuple(
        ClusterDrift(
            cluster=k,
            stored=int((labels == k).sum()),
            arrivals=int((found.cluster == k).sum()),
            stored_error=float(stored[labels == k].mean()) if bool((labels == k).any()) else None,
            arrivals_error=float(found.relative_error[found.cluster == k].mean()),
        )
        for k in found.cluster.unique().tolist()
    )
    result = Drift(float(stored.mean()), float(found.relative_error.mean()), clusters)
    if result.arrivals_error <= _MARGIN * result.stored_error or collection.manifest.method != "full":
        return result
    now, then = _probed(collection, arrivals, found, originals or {}, labels)
    everyone = float(torch.cat([stored, found.relative_error]).mean())
    # A few slices may be better or worse than most: only their ratio is used.
    return Drift(result.stored_error, result.arrivals_error, clusters, everyone, everyone * then / now)


def _probed(
    collection: Collection,
    arrivals: Sequence[Adapter],
    found: Projections,
    originals: Mapping[str, Adapter],
    labels: Tensor,
) -> tuple[float, float]:
    """Mean relative error of all adapters over the probe slices: today, and after a refit of the changed clusters."""
    slices, entries = collection.manifest.slices, collection.manifest.adapters
    n = len(entries)
    today_by_slice = torch.cat([collection.slice_errors(), found.slice_errors]).double().square()
    step = max(1, len(slices) // _PROBES)
    norms, now, then = (torch.zeros(n + len(arrivals), dtype=torch.float64) for _ in range(3))
    everyone = torch.cat([labels, found.cluster])
    changed = found.cluster.unique().tolist()
    for m in range(0, len(slices), step)[:_PROBES]:
        name = slices[m].name
        u, v = collection.basis(name)
        known = [
            originals[e.name].factors(name) if e.name in originals else surrogate(collection, row, m, u, v)
            for row, e in enumerate(entries)
        ]
        factors = [None if pair is None else Factors(*pair) for pair in known] + factors_of(arrivals, name)
        problem = SliceProblem.from_factors(factors, name)
        at = problem.members
        today = today_by_slice[at, m].nan_to_num(0.0)
        # UΣV holds 1 − e² of its original's squared norm.
        stands_in = torch.tensor([i < n and entries[i].name not in originals for i in at.tolist()])
        whole = problem.squared_norms / torch.where(stands_in, (1 - today).clamp_min(0.01), 1.0)
        lost = today.clone()
        for k in changed:
            positions = (everyone[at] == k).nonzero()[:, 0]
            members = problem.subset(positions)
            fit = fit_full(members, u.shape[2], start=(u[k], v[k]), max_sweeps=_PROBE_SWEEPS)
            left = 1 - (fit.sigma.double().square().flatten(1).sum(1) / members.squared_norms)
            own = today[positions]
            lost[positions] = torch.where(stands_in[positions], own + (1 - own) * left, left).clamp_min(0)
        norms[at] += whole
        now[at] += today * whole
        then[at] += lost * whole
    present = norms > 0
    return tuple(float((x[present] / norms[present]).sqrt().mean()) for x in (now, then))  # type: ignore[return-value]
