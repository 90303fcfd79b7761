"""Task data: one JSONL file for each adapter, split 80-10-10 in file order, and the prompt made of an item."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError

END_OF_TURN = "<|im_end|>"
"""Ends a prompt's turn, and every answer."""

_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Item:
    """One line of a task file: what is asked and the answer that counts as right."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        """ChatML without a system turn, as the adapters were trained (the model's own template would add one)."""
        return f"<|im_start|>user\n{self.instruction}\n{self.input}{END_OF_TURN}\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Task:
    """One split of one task file."""

    name: str
    items: tuple[Item, ...]

    @property
    def sha256(self) -> str:
        """Digest of the items, so of the file's relevant part and of the limit."""
        lines = [[item.instruction, item.input, item.output] for item in self.items]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def read_task(folder: Path, name: str, *, split: str = "test", limit: int | None = None) -> Task:
    """One split ("train", "validation" or "test") of ``folder/name.jsonl``, or the first ``limit`` items of it.

    The split goes by file order: the first 80 % train, the next 10 % validation, the rest test.

    Raises:
        JDLoRAError: no such file, a line that is not an item, or nothing in the split.
    """
    file = Path(folder) / f"{name}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise JDLoRAError(f"{file}: missing; the task data of adapter {name!r} is a file of its name") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JDLoRAError(f"{file}: cannot be read ({error})") from error
    items = [_item(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    count = len(items)
    first, second = count * 8 // 10, count * 9 // 10
    try:
        part = {"train": items[:first], "validation": items[first:second], "test": items[second:]}[split]
    except KeyError:
        raise JDLoRAError(f"no split named {split!r}: train, validation or test") from None
    if not part:
        raise JDLoRAError(f"{file}: {count} items are too few for a {split} split of 80-10-10")
    return Task(name, tuple(part[:limit]))


def _item(line: str, where: str) -> Item:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JDLoRAError(f"{where}: not a line of JSON ({error})") from error
    if not isinstance(fields, dict) or any(not isinstance(fields.get(field), str) for field in _FIELDS):
        raise JDLoRAError(f"{where}: must be an object with the texts instruction, input and output")
    if not fields["output"].strip():
        raise JDLoRAError(f"{where}: the output is empty; there is nothing to score")
    return Item(*(fields[field] for field in _FIELDS))
