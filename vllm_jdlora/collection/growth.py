"""Bases that grow: directions of new adapters appended to those of the clusters that take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection.arrivals import factors_of, problem_of
from vllm_jdlora.collection.io import TORCH_DTYPES, Collection
from vllm_jdlora.collection.own_metric import MetricOfSlice, in_metric
from vllm_jdlora.collection.quantize import cast_of
from vllm_jdlora.jd.arrival import lifted_columns, missing_directions
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.slice_fit import Bases, Metric, seen


def grown_bases(
    old: Collection, adapters: Sequence[Adapter], cluster: Tensor, extra: int, metrics: MetricOfSlice | None
) -> list[Bases]:
    """(U [K, d_out, R + D], V [K, R + D, d_in]) of each slice, as stored; zeros in clusters that take no adapter.

    The D = `extra` directions of a cluster are those that its bases lack most for the adapters with its label in
    `cluster` [m], in the metric.
    """
    cast = cast_of(old.manifest.quantize, TORCH_DTYPES[old.manifest.dtype])
    grown = []
    for part in old.manifest.slices:
        u, v = old.basis(part.name)
        wide_u, wide_v = torch.nn.functional.pad(u, (0, extra)), torch.nn.functional.pad(v, (0, 0, 0, extra))
        problem = problem_of(factors_of(adapters, part.name), part.name)
        if problem is not None:
            metric, view = in_metric(metrics, part.name, problem)
            labels = cluster[problem.members]
            for k in labels.unique().tolist():
                positions = (labels == k).nonzero()[:, 0]
                p, q = _missing(problem.subset(positions), view.subset(positions), metric, u[k], v[k], extra)
                wide_u[k, :, -extra:], wide_v[k, -extra:] = cast(p.T.float()).T, cast(q.float())
        grown.append((wide_u, wide_v))
    return grown


def _missing(plain: SliceProblem, view: SliceProblem, metric: Metric | None, u: Tensor, v: Tensor, extra: int) -> Bases:
    """p [d_out, D] and q [D, d_in] fp64 beside u [d_out, R] and v [R, d_in]; orthonormal in the metric."""
    seen_u, seen_v = seen(metric, u, v)
    p, q = missing_directions(view, seen_u, seen_v, extra)
    if metric is None:
        return p, q
    # They lie in the spans of the adapters and the bases, whose own coordinates are known: nothing is inverted.
    p = lifted_columns(p, torch.cat([view.bt.T.double(), seen_u], 1), torch.cat([plain.bt.T.double(), u.double()], 1))
    rows = lifted_columns(
        q.T, torch.cat([view.a.T.double(), seen_v.T], 1), torch.cat([plain.a.T.double(), v.T.double()], 1)
    )
    return p, rows.T
