"""Results as JSON lines: one record for each variant and adapter, appended as they come, found again by their key."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError


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


class RecordFile:
    """A JSONL file of records that grows; without a path it lives in memory only."""

    def __init__(self, path: Path | None):
        self.path = path
        self.records: list[Record] = []
        if path is not None and path.exists():
            self.records = list(_read(path))
        self._by_key = {record.key: record for record in self.records}
        self._names = {(record.variant, record.adapter, record.task, record.key) for record in self.records}

    def find(self, key: str) -> Record | None:
        """A measurement of this content, under whatever name."""
        return self._by_key.get(key)

    def add(self, record: Record) -> None:
        """Append one record, unless the very same is there already."""
        identity = (record.variant, record.adapter, record.task, record.key)
        if identity in self._names:
            return
        self._names.add(identity)
        self.records.append(record)
        self._by_key.setdefault(record.key, record)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write: processes that measure different adapters may share the file.
                with open(self.path, "ab", buffering=0) as file:
                    file.write((json.dumps(asdict(record)) + "\n").encode())
            except OSError as error:
                raise JDLoRAError(f"{self.path}: cannot be written ({error.strerror})") from error


def read_records(path: Path) -> list[Record]:
    """All records of a results file, oldest first."""
    return RecordFile(path).records


def _read(path: Path) -> Iterator[Record]:
    """The records of a file; a last line that a killed run left half written is cut off."""
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_bytes(whole)
            os.replace(temporary, path)
    except OSError as error:
        raise JDLoRAError(f"{path}: cannot be read ({error.strerror})") from error
    names = {f.name for f in fields(Record)}
    for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise JDLoRAError(f"{path}:{number}: not a line of JSON ({error})") from error
        if not isinstance(values, dict) or set(values) != names:
            raise JDLoRAError(f"{path}:{number}: not a record of this version's evaluation; choose another --output")
        yield Record(**values)
