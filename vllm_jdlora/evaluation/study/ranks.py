"""The part "ranks" (the paper's H.1): adapters truncated to lower ranks, then compressed to the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_jdlora.adapter import Adapter, read_adapters
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.ours import reference, size_of
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.summary import Row, summarise
from vllm_jdlora.evaluation.truncation import truncated
from vllm_jdlora.evaluation.variant import Variant, of_collection, uncompressed

RANKS = (2, 4, 8, 16)


def ranks(study: Study) -> Part:
    """With the reference's rank and clusters throughout, so that bases and scalings take the same bytes.

    One table against the original adapters, and one for each rank against the truncated adapters.
    """
    chosen = reference(study, "ranks")
    if chosen is None:
        return Part()
    size = size_of(chosen)
    tried = [rank for rank in RANKS if rank <= max(adapter.rank for adapter in study.adapters)]
    originals = Comparison(study, "ranks", study.adapters, study.measured, study.settings.limit)
    study.begin("ranks", (2 + 5 * len(tried)) * len(originals.tasks))
    records = originals.references()
    bases = records[: len(originals.tasks)]
    made = study.recipe(chosen.manifest.method, rank=size["rank"], clusters=size["clusters"])
    tables: dict[str, Sequence[Row]] = {}
    for rank in tried:
        cut = truncated_adapters(study.adapters, rank, study.settings.output / "adapters" / f"rank-{rank}")
        names = {adapter.name for adapter in study.measured}
        own = Comparison(
            study, f"ranks-{rank}", cut, [adapter for adapter in cut if adapter.name in names], study.settings.limit
        )
        found = own.references(scored=bases)
        known = found[len(own.tasks) :]
        compressed = partial(_variant, study, f"rank-{rank}", cut, made)
        joint = own.measure(f"{study.settings.family}: rank {rank}", made, compressed)
        if joint:
            tables[f"against the adapters truncated to rank {rank}"] = summarise(found + joint)
        cut_made = {"truncated": rank}
        records += originals.measure(f"truncated: rank {rank}", cut_made, partial(uncompressed, cut), scored=known)
        if joint:
            name = f"{study.settings.family}: rank {rank}"
            records += originals.measure(name, made | cut_made, compressed, scored=joint)
    return Part({"against the original adapters": summarise(records), **tables}, records, {"size": size})


def truncated_adapters(adapters: Sequence[Adapter], rank: int, folder: Path) -> list[Adapter]:
    """`truncated` of each adapter in ``folder/NAME``; those that are there are kept."""
    for adapter in adapters:
        if not (folder / adapter.name).exists():
            truncated(adapter, rank, folder / adapter.name)
    return read_adapters([folder / adapter.name for adapter in adapters])[0]


def _variant(study: Study, label: str, adapters: Sequence[Adapter], made: Mapping[str, Any]) -> Variant:
    return of_collection(study.collection(label, adapters, made), "")
