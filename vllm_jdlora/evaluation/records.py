"""Results as JSON lines: one record for each variant and adapter, appended as they come, found again by their key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.known_mean import mean_of_known


@dataclass(frozen=True)
class Record:
    """What one adapter does on one task as one variant keeps it.

    Attributes:
        key: digest of everything the scores depend on: ΔW, the model, the items, the settings.
        variant, adapter, task: names. The task is another adapter's in the leakage study.
        bytes: of the variant, for all its adapters together.
        adapters: how many share these bytes.
        relative_error, output_error: not squared; the latter is None without moments.
        loss: mean over items and tokens: the mean negative log-likelihood of a token (nats).
        token_accuracy, exact_match, rouge_l: means in [0, 1] over tokens, items, items.
        agreement, agreement_with_base: share of answers identical to the uncompressed adapter's, the base model's.
        losses, tokens, correct, exact, rouge, agrees: the same by item, for intervals (losses: mean of an item).
        answers: greedy answers as text; empty where only the loss was asked for.
    """

    key: str
    variant: str
    adapter: str
    task: str
    bytes: int
    adapters: int
    relative_error: float
    output_error: float | None
    loss: float
    token_accuracy: float
    exact_match: float | None
    rouge_l: float | None
    agreement: float | None
    agreement_with_base: float | None
    losses: list[float]
    tokens: list[int]
    correct: list[int]
    exact: list[int]
    rouge: list[float]
    agrees: list[int]
    answers: list[str]

    @property
    def bytes_per_adapter(self) -> float:
        return self.bytes / self.adapters


def first_items(record: Record, count: int | None, *, answers: bool = True) -> Record:
    """The record of the first `count` items (None: all), as measuring these alone gives it; key and names are kept.

    answers: False leaves them and what is computed from them out. Agreement with the base model is known of all items
    only: it is None.
    """
    losses, tokens, correct = record.losses[:count], record.tokens[:count], record.correct[:count]
    few = 0 if not answers else count
    exact, rouge, agrees = record.exact[:few], record.rouge[:few], record.agrees[:few]
    return replace(
        record,
        loss=sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens),
        token_accuracy=sum(correct) / sum(tokens),
        exact_match=mean_of_known(exact),
        rouge_l=mean_of_known(rouge),
        agreement=mean_of_known(agrees),
        agreement_with_base=None,
        losses=losses,
        tokens=tokens,
        correct=correct,
        exact=exact,
        rouge=rouge,
        agrees=agrees,
        answers=record.answers[:few],
    )


class RecordFile:
    """A JSONL file of records that grows; without a path it lives in memory only.

    elsewhere: another place where a measurement of some content may be found, by its key.
    """

    def __init__(self, path: Path | None, elsewhere: Callable[[str], Record | None] | None = None):
        self.path = path
        self.records: list[Record] = []
        if path is not None and path.exists():
            self.records = list(_read(path))
        self._by_key = {record.key: record for record in self.records}
        self._by_name = {(record.variant, record.adapter, record.task, record.key): record for record in self.records}
        self._elsewhere = elsewhere

    def find(self, key: str) -> Record | None:
        """A measurement of this content, under whatever name."""
        known = self.own(key)
        return self._elsewhere(key) if known is None and self._elsewhere is not None else known

    def own(self, key: str) -> Record | None:
        """The same, of this file alone."""
        return self._by_key.get(key)

    def named(self, variant: str, adapter: str, task: str, key: str) -> Record | None:
        """The record of this content under these names, of this file alone."""
        return self._by_name.get((variant, adapter, task, key))

    def add(self, record: Record) -> None:
        """Append one record, unless the very same is there already."""
        identity = (record.variant, record.adapter, record.task, record.key)
        if identity in self._by_name:
            return
        self._by_name[identity] = record
        self.records.append(record)
        self._by_key.setdefault(record.key, record)
        if self.path is not None:
            append_line(self.path, asdict(record))


def append_line(path: Path, value: Any) -> None:
    """One more line of JSON. Raises JDLoRAError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write: processes that measure different adapters may share the file.
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(value) + "\n").encode())
    except OSError as error:
        raise JDLoRAError(f"{path}: cannot be written ({error.strerror})") from error


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of the lines of JSON; a last line that a killed run left half written is cut off.

    Raises JDLoRAError for a file that cannot be read, or a line that is not JSON.
    """
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with replacing(path) as new:
                new.write_bytes(whole)
    except OSError as error:
        raise JDLoRAError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise JDLoRAError(f"{path}:{number}: not a line of JSON ({error})") from error


def _read(path: Path) -> Iterator[Record]:
    names = {f.name for f in fields(Record)}
    for number, values in read_lines(path):
        if not isinstance(values, dict) or set(values) != names:
            raise JDLoRAError(f"{path}:{number}: not a record of this version's evaluation; choose another --output")
        yield Record(**values)
