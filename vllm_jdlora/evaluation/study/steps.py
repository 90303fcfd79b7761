"""What a study has finished, as JSON lines: a step is found again by everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.records import append_line, read_lines


class Steps:
    """A file of finished steps that grows. A step is described by values that JSON can hold."""

    def __init__(self, path: Path):
        self.path = path
        self._results: dict[str, Any] = {}
        for number, line in read_lines(path) if path.exists() else ():
            if not isinstance(line, dict) or not {"step", "result"} <= set(line):
                raise JDLoRAError(f"{path}:{number}: not a step of this version's study; choose another OUTPUT")
            self._results[line["step"]] = line["result"]

    def find(self, what: Mapping[str, Any]) -> Any | None:
        """The result of this very step, None if it is still to be done."""
        return self._results.get(_digest(what))

    def add(self, title: str, what: Mapping[str, Any], result: Any) -> None:
        """Note a finished step; `title` is for readers."""
        self._results[_digest(what)] = result
        append_line(self.path, {"title": title, "step": _digest(what), "result": result})


def _digest(what: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
