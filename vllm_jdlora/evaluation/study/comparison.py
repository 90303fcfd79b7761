"""Variants of one set of adapters beside these adapters, each measured on the adapters' tasks unless it is already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.evaluation.evaluate import BASE, UNCOMPRESSED, Evaluation, base, read_tasks
from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.variant import Variant, uncompressed


@dataclass(frozen=True)
class _Asked:
    """The arguments of `Comparison.measure`."""

    name: str
    made: Mapping[str, Any]
    make: Callable[[], Variant]
    scored: Sequence[Record] = ()


class Comparison:
    """One set of adapters, the tasks of those to measure, and the records file of their variants.

    stem: of the records file. measured: those of the adapters whose tasks are measured. limit: of test items.
    """

    def __init__(
        self, study: Study, stem: str, adapters: Sequence[Adapter], measured: Sequence[Adapter], limit: int | None
    ):
        self.study = study
        self.adapters = adapters
        self.tasks = read_tasks(study.settings.tasks, measured, limit)
        self.records = study.records(stem)

    @cached_property
    def evaluation(self) -> Evaluation:
        study = self.study
        return Evaluation(
            study.model, self.adapters, self.tasks, self.records, study.judged, study.settings.max_new_tokens
        )

    def references(self, *, answers: bool = True, scored: Sequence[Record] = ()) -> list[Record]:
        """Base model, then uncompressed adapters. scored: of the base model, beside other adapters of these names."""
        asked = [_Asked(BASE, {}, base, scored), _Asked(UNCOMPRESSED, {}, lambda: uncompressed(self.adapters))]
        return self._measured(asked, answers)

    def measure(
        self,
        name: str,
        made: Mapping[str, Any],
        make: Callable[[], Variant],
        *,
        answers: bool = True,
        scored: Sequence[Record] = (),
    ) -> list[Record]:
        """One record for each adapter with a task; none where the variant is refused, see `Study.attempt`.

        name: of the variant. made: all that the variant depends on beside the adapters and the study's folder.
        make: called only if something is missing. answers: greedy answers too. scored: records of the very same ΔW
        beside other adapters: their scores count here too.
        """
        return self._measured([_Asked(name, made, make, scored)], answers)

    def _measured(self, asked: Sequence[_Asked], answers: bool) -> list[Record]:
        """All variants of one adapter before the next one's: base and uncompressed need each other's answers."""
        known = {one.name: self._finished(one, answers) for one in asked}
        missing = {one.name: one for one in asked if known[one.name] is None}
        self.study.tick(sum(len(records) for records in known.values() if records is not None))
        variants = {name: self.study.attempt(name, one.make) for name, one in missing.items()}
        found: dict[str, list[Record]] = {name: records or [] for name, records in known.items()}
        for adapter in self.tasks:
            for name, variant in variants.items():
                if variant is not None:
                    found[name].append(self._one(missing[name], variant, adapter, answers))
                self.study.tick()
        for name, variant in variants.items():
            if variant is not None:
                keys = {record.adapter: record.key for record in found[name]}
                self.study.steps.add(name, self._step(missing[name], answers), keys)
        return [record for records in found.values() for record in records]

    def _one(self, asked: _Asked, variant: Variant, adapter: str, answers: bool) -> Record:
        variant = replace(variant, name=asked.name)
        scored = next((record for record in asked.scored if record.adapter == adapter), None)
        if scored is not None:
            return self.evaluation.adopt(scored, variant)
        return self.evaluation.measure(variant, adapter, adapter, answers=answers)

    def _finished(self, asked: _Asked, answers: bool) -> list[Record] | None:
        keys = self.study.steps.find(self._step(asked, answers))
        if keys is None:
            return None
        found = [self.records.named(asked.name, adapter, adapter, key) for adapter, key in keys.items()]
        whole = [record for record in found if record is not None]
        return whole if len(whole) == len(found) else None

    def _step(self, asked: _Asked, answers: bool) -> dict[str, Any]:
        return {
            "variant": asked.name,
            "made": asked.made,
            "records": str(self.records.path and self.records.path.name),
            "adapters": [adapter.sha256 for adapter in self.adapters],
            "tasks": {adapter: task.sha256 for adapter, task in self.tasks.items()},
            "model": self.study.fingerprint,
            "judged": self.study.judged_by,
            "answers": self.study.settings.max_new_tokens if answers else 0,
        }
