"""The part "sweep": many clusters of low rank or few of high rank, at equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.source import common_slices, sizes_of
from vllm_jdlora.evaluation.output_error import error
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.ours import share_label
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.settings import FEW_ITEMS
from vllm_jdlora.evaluation.study.study import QUANTIZE, Study
from vllm_jdlora.evaluation.summary import summarise
from vllm_jdlora.evaluation.variant import Variant, of_collection, uncompressed
from vllm_jdlora.jd.budget import Sizes
from vllm_jdlora.jd.error_curves import cluster_grid, diagonal_grid


def sweep(study: Study) -> Part:
    """For each budget and number of clusters the largest rank that fits: errors of all adapters, losses of some."""
    settings = study.settings
    fitted = [adapter for adapter in study.adapters if not adapter.plain_only]
    sizes = sizes_of(
        fitted,
        common_slices(fitted),
        dtype_width=2,
        quantize=QUANTIZE,
        always_plain=2 * sum(adapter.parameters for adapter in study.adapters if adapter.plain_only),
    )
    points = [
        (share, method, k, rank)
        for share in settings.budgets
        for method in settings.methods
        for k in _grid(sizes.n, method)
        if (rank := largest_rank(replace(sizes, diagonal=method == "diag"), k, study.bytes_at(share)))
    ]
    comparison = Comparison(study, "sweep", study.adapters, study.measured, settings.limit or FEW_ITEMS)
    study.begin("sweep", (2 + len(points)) * len(comparison.tasks) + len(points))
    records = comparison.references(answers=False)
    facts: list[dict[str, Any]] = []
    for share, method, k, rank in points:
        made = study.recipe(method, rank=rank, clusters=k)
        label = f"sweep-{share_label(share)}-{method}-K{k}-R{rank}"
        opened = partial(study.collection, label, study.adapters, made)
        name = f"{share}: JD-{method.capitalize()}, K {k}, R {rank}"
        errors = study.attempt(name, partial(_errors, study, opened, made))
        study.tick()
        if errors is not None:
            found = comparison.measure(name, made, partial(_variant, opened), answers=False)
            facts.append(
                {
                    "budget": str(share),
                    "method": method,
                    "clusters": k,
                    "rank": rank,
                    **errors,
                    "loss": _mean_loss(found),
                }
            )
            records += found
    return Part({"": summarise(records)}, records, {"points": facts, "items": settings.limit or FEW_ITEMS})


def _grid(n: int, method: str) -> Sequence[int]:
    if method == "diag":
        return diagonal_grid(n)
    return [k for k in cluster_grid(n) if k < n] or [1]


def largest_rank(sizes: Sizes, clusters: int, budget: int) -> int:
    """The largest rank of so many clusters that takes at most `budget` bytes; 0 if there is none."""
    most = max(min(part) for part in sizes.slices)
    return max(takewhile(lambda rank: sizes.total(clusters, rank) <= budget, range(1, most + 1)), default=0)


def _errors(study: Study, opened: partial[Collection], made: Mapping[str, Any]) -> dict[str, Any]:
    """Mean relative and output error of all adapters (not squared), and the bytes; found again once measured."""
    what = {"errors": made, "adapters": [a.sha256 for a in study.adapters], "judged": study.judged_by}
    found = study.steps.find(what)
    if found is None:
        variant, originals = _variant(opened), uncompressed(study.adapters)
        relative, output = [], []
        for adapter in study.adapters:
            original, update = originals.update(adapter.name), variant.update(adapter.name)
            relative.append(error(original, update))
            output.append(error(original, update, study.judged))
        n = len(study.adapters)
        found = {
            "share_of_bytes": variant.bytes / originals.bytes,
            "relative_error": sum(relative) / n,
            "output_error": sum(output) / n,
        }
        study.steps.add("errors", what, found)
    return dict(found)


def _variant(opened: partial[Collection]) -> Variant:
    return of_collection(opened(), "")


def _mean_loss(records: list[Record]) -> float:
    return sum(record.loss for record in records) / len(records)
