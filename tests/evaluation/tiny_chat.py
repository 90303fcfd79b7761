"""The tiny Llama with a ChatML tokenizer, adapters and task files: what the evaluation's tests run on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests import tiny_llama
from tests.tiny_tokenizer import write_tokenizer

WORDS = ("red", "blue", "cat", "dog", "Rome", "seven", "an", "of")


def write_chat_model(folder: Path) -> Path:
    """Single bytes as tokens; its longest text is 256 tokens."""
    tiny_llama.write_model(folder)
    return write_tokenizer(folder)


def write_task(file: Path, seed: int, items: int = 40) -> Path:
    """Short questions of unequal length under one instruction."""
    generator = random.Random(seed)
    lines = []
    for _ in range(items):
        words = generator.choices(WORDS, k=generator.randint(1, 3))
        lines.append({"instruction": f"Task {seed}.", "input": " ".join(words), "output": generator.choice(words)})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
