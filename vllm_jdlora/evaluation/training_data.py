"""Task items as token batches for training: answers scored, prompts not, the shared start of a batch kept once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.tasks import END_OF_TURN, Task

# Batches are cut from pools of so many, sorted by length: little padding, and still another mix in each epoch.
_POOL = 16


@dataclass(frozen=True)
class Example:
    """Prompt, answer and the token that ends it; the tokens from ``answer`` on are scored."""

    tokens: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Batch:
    """Examples that begin alike (the instruction of a task): the common start is run once, not for each.

    Attributes:
        prefix: the common start [1, P] int64; P may be 0.
        ids: what follows in each example [B, T] int64, padded on the right.
        mask: bool [B, T], False on padding.
        scored: bool [B, T], True where the next token is part of an answer.
        labels: those next tokens [scored positions] int64.
    """

    prefix: Tensor
    ids: Tensor
    mask: Tensor
    scored: Tensor
    labels: Tensor


def read_examples(task: Task, tokenizer: Any, max_tokens: int) -> list[Example]:
    """The task's items as tokens, those longer than ``max_tokens`` left out.

    Raises:
        JDLoRAError: the tokenizer lacks the end of turn, or every item is too long.
    """
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end is None or end == tokenizer.unk_token_id:
        raise JDLoRAError(f"the model's tokenizer has no token {END_OF_TURN}; the task prompts are ChatML")
    examples = []
    for item in task.items:
        # Apart, as in serving: there the prompt is tokenised before there is an answer.
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.prompt, item.output))
        if len(prompt) + len(answer) < max_tokens:
            examples.append(Example((*prompt, *answer, end), len(prompt)))
    if not examples:
        raise JDLoRAError(f"task {task.name!r}: every item has more than {max_tokens} tokens; raise --max-tokens")
    return examples


def epoch_order(examples: Sequence[Example], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as indices, by length; a function of seed and epoch, so training can go on anywhere."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), size * _POOL):
        pool = sorted(order[start : start + size * _POOL], key=lambda i: len(examples[i].tokens))
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def in_order(examples: Sequence[Example], size: int) -> list[list[int]]:
    """All examples once, by length: for measuring."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    return [order[i : i + size] for i in range(0, len(order), size)]


def make_batch(examples: Sequence[Example]) -> Batch:
    # The last token before an answer predicts its first: it never belongs to the prefix.
    shared = min(example.answer for example in examples) - 1
    first = examples[0].tokens
    for example in examples[1:]:
        shared = next((i for i in range(shared) if example.tokens[i] != first[i]), shared)
    rest = max(len(example.tokens) for example in examples) - 1 - shared  # nothing follows the last token
    ids = torch.zeros(len(examples), rest, dtype=torch.int64)
    mask = torch.zeros(len(examples), rest, dtype=torch.bool)
    scored = torch.zeros_like(mask)
    labels: list[int] = []
    for row, example in enumerate(examples):
        own = example.tokens[shared:-1]
        ids[row, : len(own)] = torch.tensor(own)
        mask[row, : len(own)] = True
        scored[row, example.answer - 1 - shared : len(own)] = True
        labels += example.tokens[example.answer :]
    return Batch(torch.tensor([first[:shared]], dtype=torch.int64), ids, mask, scored, torch.tensor(labels))
