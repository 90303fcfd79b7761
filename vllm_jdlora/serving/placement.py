"""Where an adapter that comes to a running server is served: compressed in its best cluster, or as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.arrivals import check_base_model, project, reason_to_stay_plain
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.engine_settings import targets_of_plain


@dataclass(frozen=True, eq=False)
class Placement:
    """Attributes:
    sigma: Σ as stored on the bases of `cluster`; None for an adapter that stays plain.
    cluster: the best one; None where none was looked for.
    relative_error: ‖ΔW − UΣV‖_F / ‖ΔW‖_F in that cluster; None where it was not measured.
    told: the decision in words.
    """

    sigma: Tensor | None
    cluster: int | None
    relative_error: float | None
    told: str


def error_limit(collection: Collection, asked: float | None) -> float:
    """The relative error above which an adapter is not compressed.

    What the server was started with, else the collection's own limit where that is one of relative errors, else the
    worst error that the collection's adapters have.
    """
    manifest = collection.manifest
    if asked is not None:
        return asked
    if manifest.max_error is not None and manifest.metric == "frobenius":
        return manifest.max_error
    return max(entry.relative_error for entry in manifest.adapters)


def place(collection: Collection, adapter: Adapter, limit: float) -> Placement:
    """Project an adapter on every cluster's bases and decide.

    Raises:
        JDLoRAError: it is for another base model.
    """
    check_base_model(collection, [adapter], None)
    if reason := reason_to_stay_plain(collection, adapter):
        return Placement(None, None, None, f"kept uncompressed: {reason}")
    found = project(collection, [adapter])
    cluster, error = int(found.cluster[0]), float(found.relative_error[0])
    if not bool(found.sigma[0].isfinite().all()):
        told = f"kept uncompressed: its scaling matrices do not fit into {collection.manifest.dtype}"
        return Placement(None, cluster, None, told)
    if not error <= limit:
        told = f"kept uncompressed: relative error {error:.3g} is over the limit {limit:.3g}"
        return Placement(None, cluster, error, told)
    told = f"compressed into cluster {cluster} with relative error {error:.3g} (limit {limit:.3g})"
    return Placement(found.sigma[0], cluster, error, told)


def check_plain(adapter: Adapter, lora_config: Any) -> None:
    """Refuse an uncompressed adapter that the workers of a running server cannot load.

    lora_config: vLLM's ``LoRAConfig``.

    Raises:
        JDLoRAError: what it needs.
    """
    wrapped = lora_config.target_modules
    if wrapped is not None and (unserved := sorted(targets_of_plain(adapter) - set(wrapped))):
        raise JDLoRAError(
            f"adapter {adapter.name!r} changes {', '.join(unserved)}, which this server does not adapt: start it with "
            "--lora-target-modules that name them as well"
        )
    if adapter.rank > lora_config.max_lora_rank:
        raise JDLoRAError(
            f"adapter {adapter.name!r} has rank {adapter.rank}, this server takes {lora_config.max_lora_rank}: start "
            "it with a larger --max-lora-rank"
        )
