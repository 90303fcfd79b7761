"""The metric of a collection: from second moments to a metric for each slice, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from vllm_jdlora.adapter import SliceShape
from vllm_jdlora.collection.schema import Calibration
from vllm_jdlora.collection.second_moments import SecondMoments
from vllm_jdlora.jd.metric import SliceMetric
from vllm_jdlora.jd.passes import MetricOf


def metric_of(moments: SecondMoments, slices: Sequence[SliceShape]) -> MetricOf:
    """Metrics by slice; slices of one input (q, k, v) follow each other and share its factorisation."""

    @lru_cache(maxsize=2)
    def of_input(key: str, name: str) -> SliceMetric:
        return SliceMetric.of(moments.matrices[key], name)

    @lru_cache(maxsize=2)
    def of_slice(name: str, key: str, first: str) -> SliceMetric:
        metric, gradients = of_input(key, first), moments.gradients_of(name)
        return metric if gradients is None else metric.with_gradients(gradients, name)

    first = {moments.inputs[part.name]: part.name for part in reversed(slices)}
    keys = [moments.inputs[part.name] for part in slices]
    return lambda index: of_slice(slices[index].name, keys[index], first[keys[index]])


def calibration_of(moments: SecondMoments) -> Calibration:
    """What the manifest records of the text."""
    origin = moments.origin
    return Calibration(origin.text_sha256, origin.texts, origin.tokens)
