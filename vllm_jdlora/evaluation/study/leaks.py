"""The part "leakage" (the paper's H.2): does A, compressed with B, gain on B's task?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm_jdlora.evaluation.leakage import by_kind, changes, pairs_of
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.ours import made_at, reference
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.settings import FEW_ITEMS
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.variant import of_collection


def leakage(study: Study) -> Part:
    """Changes of loss over pairs of one cluster of the reference collection, and as many of different ones."""
    collection = reference(study, "leakage")
    if collection is None:
        return Part()
    settings = study.settings
    comparison = Comparison(study, "leakage", study.adapters, study.measured, settings.limit or FEW_ITEMS)
    pairs = pairs_of(collection, list(comparison.tasks), count=settings.leakage_pairs)
    study.begin("leakage", len(pairs))
    what = {
        "leakage": [[pair.adapter, pair.task, pair.together] for pair in pairs],
        "made": made_at(study, settings.reference_budget),
        "tasks": {name: task.sha256 for name, task in comparison.tasks.items()},
        "adapters": [adapter.sha256 for adapter in study.adapters],
        "model": study.fingerprint,
    }
    kinds: dict[str, Any] | None = study.steps.find(what)
    if kinds is None:
        variant = of_collection(collection, f"{settings.family}: {settings.reference_budget}")
        found = []
        for change in changes(comparison.evaluation, variant, pairs) if pairs else ():
            found.append(change)
            study.tick()
        kinds = {kind: asdict(found) for kind, found in by_kind(found).items()}
        study.steps.add("leakage", what, kinds)
    else:
        study.tick(len(pairs))
    return Part(facts={"pairs": kinds, "items": settings.limit or FEW_ITEMS})
