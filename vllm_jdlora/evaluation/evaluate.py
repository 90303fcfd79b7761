"""Runs variants of adapters over their tasks, and skips what a results file already holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.model import SwitchableModel
from vllm_jdlora.evaluation.output_error import digest, error
from vllm_jdlora.evaluation.records import Record, RecordFile
from vllm_jdlora.evaluation.scoring import MAX_NEW_TOKENS, Score, score
from vllm_jdlora.evaluation.tasks import END_OF_TURN, Task, read_task
from vllm_jdlora.evaluation.text_metrics import rouge_l
from vllm_jdlora.evaluation.variant import Update, Variant, uncompressed
from vllm_jdlora.known_mean import mean_of_known

BASE, UNCOMPRESSED = "base", "uncompressed"
"""Names of the two variants that everything is compared with."""

_VERSION = 1
"""Part of every key: raise it when scores change their meaning."""


@dataclass(eq=False)
class Evaluation:
    """The model, the adapters and their tasks; measures one variant of one adapter at a time.

    Attributes:
        model: the base model.
        adapters: all that the variants keep, uncompressed.
        tasks: adapter name → its test items, for the adapters to measure.
        results: where records go, and come from when they are there.
        moments: slice name → C [d_in, d_in] for output errors.
        max_new_tokens: limit of an answer.
    """

    model: SwitchableModel
    adapters: Sequence[Adapter]
    tasks: Mapping[str, Task]
    results: RecordFile
    moments: Mapping[str, Tensor] | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    _prompts: dict[str, tuple[list[list[int]], list[list[int]]]] = field(default_factory=dict)
    _fresh: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._originals = uncompressed(self.adapters)
        self._moments_digest = self.moments and digest({name: (c, c[:0]) for name, c in self.moments.items()})

    @property
    def originals(self) -> Variant:
        """The uncompressed adapters."""
        return self._originals

    def run(self, variants: Iterable[Variant], *, answers: bool = True) -> Iterator[Record]:
        """Base and uncompressed first, then ``variants``; one record for each variant and adapter with a task."""
        for adapter in self.tasks:  # one adapter at a time: the two need each other's answers, which a kill would lose
            for reference in (base(), self._originals):
                yield self.measure(reference, adapter, adapter, answers=answers)
        for variant in variants:
            for adapter in self.tasks:
                yield self.measure(variant, adapter, adapter, answers=answers)

    def measure(self, variant: Variant, adapter: str, task: str, *, answers: bool = True) -> Record:
        """One adapter as ``variant`` keeps it on the test items of ``task``, from the results if it is there.

        Args:
            variant: gives the ΔW.
            adapter: whose.
            task: whose items; another adapter's in the leakage study.
            answers: also decode greedily (ROUGE-L, exact match, agreement); otherwise loss and token accuracy only.
        """
        scored = self._scored(variant, adapter, task, answers)
        agrees, with_base = [], []
        if answers:
            agrees = _same(scored.answers, self._scored(self._originals, adapter, task, True).answers)
            with_base = _same(scored.answers, self._scored(base(), adapter, task, True).answers)
        record = replace(
            scored,
            variant=variant.name,
            bytes=variant.bytes,
            adapters=len(self.adapters),
            agreement=mean_of_known(agrees),
            agreement_with_base=mean_of_known(with_base),
            agrees=agrees,
        )
        self.results.add(record)
        return record

    def adopt(self, scored: Record, variant: Variant) -> Record:
        """What `measure` gives, from scores of the very same ΔW that were taken beside other originals.

        Errors and agreement are found anew; nothing goes through the model but what these originals themselves lack.
        """
        adapter, task, answers = scored.adapter, scored.task, bool(scored.answers)
        update, original = variant.update(adapter), self._originals.update(adapter)
        key = self._key(update, original, task, answers)
        if self.results.find(key) is None:
            self._fresh[key] = replace(scored, key=key, **self._errors(update, original))
        return self.measure(variant, adapter, task, answers=answers)

    def _scored(self, variant: Variant, adapter: str, task: str, answers: bool) -> Record:
        """The scores alone: names and agreement are filled in by the caller."""
        update, original = variant.update(adapter), self._originals.update(adapter)
        key = self._key(update, original, task, answers)
        known = self._fresh.get(key) or self.results.find(key)
        if known is None:
            drafts = None
            if answers and variant.name not in (BASE, UNCOMPRESSED):
                texts = self._scored(self._originals, adapter, task, True).answers
                drafts = [[self.model.tokens(text + END_OF_TURN)] for text in texts]
            prompts, targets = self._tokens(task)
            self.model.apply(update)
            scores = score(self.model, prompts, targets, drafts, answers=answers, max_new_tokens=self.max_new_tokens)
            known = self._record(key, adapter, task, scores, update, original)
            self._fresh[key] = known
        return known

    def _record(
        self, key: str, adapter: str, task: str, scores: Sequence[Score], update: Update, original: Update
    ) -> Record:
        items = self.tasks[task].items
        texts = [self.model.text(s.answer) for s in scores if s.answer is not None]
        exact = [int(text == item.output.strip()) for text, item in zip(texts, items, strict=False)]
        rouge = [round(rouge_l(item.output, text), 6) for text, item in zip(texts, items, strict=False)]
        tokens = sum(s.tokens for s in scores)
        return Record(
            key=key,
            variant="",
            adapter=adapter,
            task=task,
            bytes=0,
            adapters=1,
            **self._errors(update, original),
            loss=sum(s.loss * s.tokens for s in scores) / tokens,
            token_accuracy=sum(s.correct for s in scores) / tokens,
            exact_match=mean_of_known(exact),
            rouge_l=mean_of_known(rouge),
            agreement=None,
            agreement_with_base=None,
            losses=[round(s.loss, 6) for s in scores],
            tokens=[s.tokens for s in scores],
            correct=[s.correct for s in scores],
            exact=exact,
            rouge=rouge,
            agrees=[],
            answers=texts,
        )

    def _errors(self, update: Update, original: Update) -> dict[str, Any]:
        output = None if self.moments is None else error(original, update, self.moments)
        return {"relative_error": error(original, update), "output_error": output}

    def _tokens(self, task: str) -> tuple[list[list[int]], list[list[int]]]:
        if task not in self._prompts:
            items = self.tasks[task].items
            prompts = [self.model.tokens(item.prompt) for item in items]
            self._prompts[task] = prompts, [self.model.tokens(item.output + END_OF_TURN) for item in items]
        return self._prompts[task]

    def _key(self, update: Update, original: Update, task: str, answers: bool) -> str:
        parts = [
            _VERSION,
            digest(update),
            digest(original),
            self.model.fingerprint,
            self.tasks[task].sha256,
            self.max_new_tokens if answers else 0,
            self._moments_digest,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def base() -> Variant:
    """The base model without any adapter."""
    return Variant(BASE, 0, lambda name: {})


def chosen(adapters: Sequence[Adapter], names: Sequence[str] | None) -> list[Adapter]:
    """Those to measure: all of them without names. Raises JDLoRAError for a name that is none of theirs."""
    unknown = sorted(set(names or ()) - {adapter.name for adapter in adapters})
    if unknown:
        raise JDLoRAError(f"--only: no adapter named {unknown[0]!r}")
    return [adapter for adapter in adapters if names is None or adapter.name in names]


def read_tasks(folder: Path, adapters: Sequence[Adapter], limit: int | None = None) -> dict[str, Task]:
    """The test items of each adapter's task, by adapter name."""
    if limit is not None and limit < 1:
        raise JDLoRAError(f"a limit of {limit} items leaves nothing to evaluate")
    return {adapter.name: read_task(folder, adapter.name, limit=limit) for adapter in adapters}


def _same(texts: Sequence[str], others: Sequence[str]) -> list[int]:
    return [int(a == b) for a, b in zip(texts, others, strict=True)]
