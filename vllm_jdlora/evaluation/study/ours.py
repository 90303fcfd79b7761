"""The part "ours": this compressor at each budget, with answers on all held-out items."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from functools import partial
from typing import Any

from vllm_jdlora.collection import Collection
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.summary import summarise
from vllm_jdlora.evaluation.variant import Variant, of_collection


def ours(study: Study) -> Part:
    settings = study.settings
    comparison = Comparison(study, "ours", study.adapters, study.measured, settings.limit)
    variants = 1 + (settings.distillation is not None)
    study.begin("ours", (2 + variants * len(settings.budgets)) * len(comparison.tasks))
    records = comparison.references()
    sizes = {}
    for share in settings.budgets:
        name = f"{settings.family}: {share}"
        found = comparison.measure(name, made_at(study, share), partial(_variant, study, share))
        if found:
            sizes[name] = size_of(collection_at(study, share))
        records += found
        if settings.distillation is not None:
            made = made_at(study, share) | {"distilled": asdict(settings.distillation), "data": study.training_data}
            name = f"{settings.family}, distilled: {share}"
            records += comparison.measure(name, made, partial(_distilled, study, share))
    return Part({"": summarise(records)}, records, {"sizes": sizes})


def collection_at(study: Study, share: Fraction) -> Collection:
    """All adapters by the method and metric that are asked for, in a share of their bytes."""
    return study.collection(_label(study, share), study.adapters, made_at(study, share))


def made_at(study: Study, share: Fraction) -> dict[str, Any]:
    """The recipe of `collection_at`."""
    return study.recipe(study.settings.method, max_bytes=share)


def reference(study: Study, part: str) -> Collection | None:
    """The collection whose rank and clusters the ablations take; None, and noted for the part, where it is refused."""
    return study.attempt(part, lambda: collection_at(study, study.settings.reference_budget))


def size_of(collection: Collection) -> dict[str, int]:
    """Rank, clusters, and how many adapters stayed plain."""
    manifest = collection.manifest
    return {"rank": manifest.rank, "clusters": manifest.clusters, "plain": len(manifest.plain)}


def share_label(share: Fraction) -> str:
    """As part of a file's name."""
    return str(share).replace("/", "-")


def _label(study: Study, share: Fraction) -> str:
    return f"{study.settings.family.replace(', ', '-')}-{share_label(share)}"


def _variant(study: Study, share: Fraction) -> Variant:
    return of_collection(collection_at(study, share), "")


def _distilled(study: Study, share: Fraction) -> Variant:
    return of_collection(study.distilled(f"{_label(study, share)}-distilled", collection_at(study, share)), "")
