"""What a part of a study found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_jdlora.evaluation.records import Record
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.summary import Row


@dataclass(frozen=True)
class Part:
    """Rows by the title of their table, the records behind them, and further facts that JSON can hold.

    refused: variant → why it could not be fitted.
    """

    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    records: Sequence[Record] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Without the records: they have files of their own."""
        tables = {title: [asdict(row) for row in rows] for title, rows in self.tables.items()}
        return {"tables": tables, **self.facts, "refused": dict(self.refused)}


Run = Callable[[Study], Part]
"""A part: measures what is missing."""
