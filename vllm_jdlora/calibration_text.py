"""The text that calibration runs the base model on: the user's file, or the one that ships with the package."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Where the tokenizer has these two, instructions are written in the chat markup that the model was trained on."""

_DEFAULT = "calibration_text.jsonl"
_FIELDS = ("instruction", "input", "output")


def read_texts(file: Path | None = None, *, chat: bool) -> list[str]:
    """The texts of one file, in their order; the package's own 221 short tasks if none is given.

    Args:
        file: ``.txt`` (a paragraph each where blank lines part them, else a line each), or ``.jsonl`` with
            ``{"text"}`` or ``{"instruction", "input", "output"}`` (input and output may be left out) on each line.
        chat: write instructions in chat markup (see ``CHAT_TOKENS``), else as plain lines.

    Raises:
        JDLoRAError: the file is missing, of another kind, or a line of it is not as told above.
    """
    if file is None:
        content = (resources.files("vllm_jdlora") / _DEFAULT).read_text(encoding="utf-8")
        return _of_json_lines(content, Path(_DEFAULT), chat)
    file = Path(file)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JDLoRAError(f"{file}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from error
    if file.suffix == ".txt":
        blocks = re.split(r"\n\s*\n", content.strip())
        texts = blocks if len(blocks) > 1 else content.splitlines()
        texts = [text.strip() for text in texts if text.strip()]
    elif file.suffix == ".jsonl":
        texts = _of_json_lines(content, file, chat)
    else:
        raise JDLoRAError(f"{file}: calibration text is a .txt or a .jsonl file")
    if not texts:
        raise JDLoRAError(f"{file}: holds no text")
    return texts


def of_task(instruction: str, input: str = "", output: str = "", *, chat: bool) -> str:
    """One task with its answer as the model sees it."""
    question = "\n".join(part for part in (instruction, input) if part)
    if not chat:
        return "\n".join(part for part in (question, output) if part)
    start, end = CHAT_TOKENS
    return f"{start}user\n{question}{end}\n{start}assistant\n{output}{end}"


def text_sha256(texts: Sequence[str]) -> str:
    """What makes two calibration texts the same: SHA-256 of the list as JSON, in hex."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _of_json_lines(content: str, file: Path, chat: bool) -> list[str]:
    texts = []
    # Not splitlines: JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            texts.append(_of_json_line(line, f"{file}, line {number}", chat))
    return texts


def _of_json_line(line: str, where: str, chat: bool) -> str:
    try:
        raw: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JDLoRAError(f"{where}: not readable as JSON ({error})") from error
    if isinstance(raw, dict) and isinstance(raw.get("text"), str) and raw["text"].strip():
        return str(raw["text"])
    if isinstance(raw, dict) and raw.get("instruction"):
        fields = [raw.get(name, "") for name in _FIELDS]
        if all(isinstance(value, str) for value in fields):
            return of_task(*fields, chat=chat)
    raise JDLoRAError(f'{where}: must be an object with "text", or with "instruction" (and "input", "output"), as text')
