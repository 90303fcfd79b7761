"""The metric that a collection was fitted in, for edits: from moments that must be those of its own calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.activation import calibration_of, metric_of
from vllm_jdlora.collection.io import Collection
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import SliceProblem
from vllm_jdlora.jd.slice_fit import Bases, Metric, seen

MetricOfSlice = Callable[[str], Metric]
"""The metric of a slice by its name; made when it is asked for, and kept only while slices of one input follow."""


def own_metric(
    collection: Collection, moments: SecondMoments | None, slices: Sequence[SliceShape]
) -> MetricOfSlice | None:
    """None without moments: the Frobenius norm.

    Raises:
        JDLoRAError: the collection was fitted in the Frobenius norm, or with other calibration text than these
            moments; they lack a slice or are of another base model.
    """
    if moments is None:
        return None
    manifest = collection.manifest
    if manifest.metric == "frobenius":
        raise JDLoRAError(f"{collection.path}: was fitted in the Frobenius norm, where second moments do not count")
    if manifest.metric == "activation":
        moments = moments.of_inputs()
    if moments.metric != manifest.metric:
        raise JDLoRAError(f"{collection.path}: was fitted in the {manifest.metric} metric: calibrate with gradients")
    if calibration_of(moments) != manifest.calibration:
        raise JDLoRAError(
            f"{collection.path}: was fitted with other calibration text than these second moments are of: calibrate "
            "with that text, or compress the adapters again"
        )
    moments.check_fit(slices, manifest.base_model.fingerprint)
    by_position = metric_of(moments, slices)
    positions = {part.name: index for index, part in enumerate(slices)}
    return lambda name: by_position(positions[name])


def required_metric(
    collection: Collection, moments: SecondMoments | None, slices: Sequence[SliceShape]
) -> MetricOfSlice | None:
    """`own_metric`; raises JDLoRAError also where the collection has a metric and there are no moments."""
    if moments is None and collection.manifest.metric != "frobenius":
        raise JDLoRAError(
            f"{collection.path}: was fitted in the {collection.manifest.metric} metric, and is refreshed in it: give "
            "its second moments (--calibration), or the base model's folder to gather them (--base-model)"
        )
    return own_metric(collection, moments, slices)


def in_metric(metrics: MetricOfSlice | None, name: str, problem: SliceProblem) -> tuple[Metric | None, SliceProblem]:
    """A slice's metric, and its adapters in the coordinates where that is the Frobenius norm."""
    metric = None if metrics is None else metrics(name)
    return metric, problem if metric is None else metric.applied_to(problem)


def seen_by_cluster(metric: Metric | None, u: torch.Tensor, v: torch.Tensor) -> Bases:
    """Bases u [K, d_out, R], v [K, R, d_in] of any dtype in those coordinates."""
    if metric is None:
        return u, v
    pairs = [seen(metric, u[k], v[k]) for k in range(len(u))]
    return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])


def orthonormal(u: torch.Tensor, v: torch.Tensor) -> Bases:
    """Orthonormal bases of the spans of u [K, d_out, R] and v [K, R, d_in], in fp32 and the same shapes."""
    columns, rows = (torch.linalg.qr(side.double()).Q.float() for side in (u, v.mT))
    pad = torch.nn.functional.pad
    return pad(columns, (0, u.shape[2] - columns.shape[2])), pad(rows, (0, v.shape[1] - rows.shape[2])).mT.contiguous()
