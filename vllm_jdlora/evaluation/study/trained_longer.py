"""The part "long": adapters trained longer beside the same-named others, each compressed on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.summary import Row, summarise
from vllm_jdlora.evaluation.variant import Variant, of_collection


def trained_longer(study: Study) -> Part:
    """Both sets at the reference's share of their bytes."""
    short = {adapter.name: adapter for adapter in study.adapters}
    if strangers := [adapter.name for adapter in study.long if adapter.name not in short]:
        raise JDLoRAError(f"--long: {strangers[0]!r} is none of --adapters; it is compared with its namesake")
    share = study.settings.reference_budget
    made = study.recipe(study.settings.method, max_bytes=share)
    wanted = {adapter.name for adapter in study.measured}
    sets = {"trained longer": study.long, "the same tasks, as the others": [short[a.name] for a in study.long]}
    measured = sum(adapter.name in wanted for adapter in study.long)
    study.begin("long", 6 * measured)
    tables: dict[str, Sequence[Row]] = {}
    records = []
    for (title, adapters), stem in zip(sets.items(), ("long", "long-short"), strict=True):
        own = [adapter for adapter in adapters if adapter.name in wanted]
        comparison = Comparison(study, stem, adapters, own, study.settings.limit)
        found = comparison.references()
        found += comparison.measure(study.settings.family, made, partial(_variant, study, stem, adapters, made))
        tables[title] = summarise(found)
        records += found
    facts = {"budget": str(share), "names": [adapter.name for adapter in study.long]}
    return Part(tables, records, facts)


def _variant(study: Study, label: str, adapters: Sequence[Adapter], made: Mapping[str, Any]) -> Variant:
    return of_collection(study.collection(label, adapters, made), "")
