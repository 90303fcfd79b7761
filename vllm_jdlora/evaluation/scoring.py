"""Loss of reference answers and greedy answers of one adapter on one task, in as few forward passes as possible.

Two things save time and change nothing in the results. The tokens that all prompts of a task share (the
instruction) go through the model once, and their keys and values are shared. And greedy decoding verifies drafts
(speculative decoding with known texts): the forward pass that scores the reference answer also says where greedy
decoding leaves it; only from there on are tokens generated, again along a draft where one fits (the answer of
the uncompressed adapter, say), and one by one where none does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_jdlora.evaluation.model import SwitchableModel

MAX_NEW_TOKENS = 64
_BATCH_TOKENS = 2048
_LOGIT_ROWS = 256

Tokens = Sequence[int]


@dataclass(frozen=True)
class Score:
    """One item.

    Attributes:
        loss: mean negative log-likelihood (nats) over the ``tokens`` of the reference answer with its end token.
        correct: how many of them are the model's first choice given those before.
        answer: ids of the greedy answer with its end token, if it came within the limit; None if not asked for.
    """

    loss: float
    tokens: int
    correct: int
    answer: list[int] | None


@dataclass
class _Row:
    """One item on its way."""

    prompt: list[int]
    target: list[int]
    drafts: list[list[int]]
    loss: float = 0.0
    correct: int = 0
    answer: list[int] = field(default_factory=list)
    done: bool = False

    def continuation(self) -> list[int]:
        """Where a draft begins with the answer so far: what it says comes next."""
        n = len(self.answer)
        for draft in self.drafts:
            if len(draft) > n and draft[:n] == self.answer:
                return draft[n:]
        return []

    def accept(self, predicted: list[int], expected: Tokens, end: int, limit: int) -> int:
        """Take first choices as long as each was made on the right text; how many were taken."""
        for count, token in enumerate(predicted, 1):
            self.answer.append(token)
            self.done = token == end or len(self.answer) >= limit
            if self.done or count > len(expected) or token != expected[count - 1]:
                return count
        return len(predicted)


@torch.inference_mode()
def score(
    model: SwitchableModel,
    prompts: Sequence[Tokens],
    targets: Sequence[Tokens],
    drafts: Sequence[Sequence[Tokens]] | None = None,
    *,
    answers: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_tokens: int = _BATCH_TOKENS,
) -> list[Score]:
    """Score ``targets`` (with their end token) after ``prompts``, and decode greedily if ``answers``.

    Args:
        model: with the adapter applied.
        prompts: token ids, at least one each.
        targets: reference answers; at least one token each.
        drafts: guesses at the greedy answer of each item; good ones save time, bad ones do no harm.
        answers: also decode greedily.
        max_new_tokens: where greedy decoding stops without an end token.
        batch_tokens: tokens in one forward pass, padding included.
    """
    rows = [
        _Row(list(prompt), list(target), [list(d) for d in guesses])
        for prompt, target, guesses in zip(prompts, targets, drafts or [[]] * len(prompts), strict=True)
    ]
    shared = _shared_prefix([row.prompt for row in rows])
    prefix = _prefill(model, rows[0].prompt[:shared])
    for batch in _batches(rows, shared, batch_tokens):
        _score_batch(model, batch, prefix, shared, answers, max_new_tokens)
    return [Score(r.loss, len(r.target), r.correct, r.answer if answers else None) for r in rows]


def _score_batch(model: SwitchableModel, rows: list[_Row], prefix: Any, shared: int, answers: bool, limit: int) -> None:
    cache = copy.deepcopy(prefix)
    if shared:
        cache.batch_repeat_interleave(len(rows))
    visible = torch.ones(len(rows), shared, dtype=torch.bool)
    fed = [row.prompt[shared:] + row.target[:-1] for row in rows]
    begins = [len(row.prompt) - shared - 1 for row in rows]
    hidden = _forward(model, fed, [shared] * len(rows), visible, cache)
    wanted = torch.cat(
        [hidden[i, begin : begin + len(row.target)] for i, (row, begin) in enumerate(zip(rows, begins, strict=True))]
    )
    losses, choices = _losses(model, wanted, torch.tensor([t for row in rows for t in row.target]))
    at = 0
    kept = []
    for row, begin in zip(rows, begins, strict=True):
        end = at + len(row.target)
        row.loss = float(losses[at:end].mean())
        row.correct = sum(a == b for a, b in zip(choices[at:end], row.target, strict=True))
        accepted = row.accept(choices[at:end], row.target, model.end, limit)
        kept.append(begin + accepted)
        at = end
    if answers:
        visible = torch.cat([visible, _first(kept, max(map(len, fed)))], dim=1)
        _finish(model, rows, visible, cache, limit)


def _finish(model: SwitchableModel, rows: list[_Row], visible: Tensor, cache: Any, limit: int) -> None:
    """Decode what is left. The last token of each answer has not been fed yet; ``visible`` says which keys count."""
    while True:
        left = [i for i, row in enumerate(rows) if not row.done]
        if not left:
            return
        if len(left) < len(rows):
            rows, visible = [rows[i] for i in left], visible[left]
            cache.batch_select_indices(torch.tensor(left, device=model.device))
        expected = [row.continuation()[: limit - len(row.answer)] for row in rows]
        fed = [[row.answer[-1], *following[:-1]] for row, following in zip(rows, expected, strict=True)]
        starts = [len(row.prompt) + len(row.answer) - 1 for row in rows]
        hidden = _forward(model, fed, starts, visible, cache)
        lengths = [len(tokens) for tokens in fed]
        choices = _choices(model, torch.cat([hidden[i, :n] for i, n in enumerate(lengths)]))
        kept, at = [], 0
        for row, following, n in zip(rows, expected, lengths, strict=True):
            kept.append(row.accept(choices[at : at + n], following, model.end, limit))
            at += n
        visible = torch.cat([visible, _first(kept, max(lengths))], dim=1)


def _forward(
    model: SwitchableModel, fed: Sequence[Tokens], starts: Sequence[int], visible: Tensor, cache: Any
) -> Tensor:
    """Hidden states [B, T, d] of tokens padded on the right; each sees the ``visible`` cache and those before it."""
    width = max(map(len, fed))
    ids = torch.tensor([[*tokens, *([model.end] * (width - len(tokens)))] for tokens in fed])
    positions = torch.tensor(starts)[:, None] + torch.arange(width)
    causal = torch.ones(width, width, dtype=torch.bool).tril().expand(len(fed), -1, -1)
    mask = torch.cat([visible[:, None, :].expand(-1, width, -1), causal], dim=2)
    device = model.device
    return model.hidden(ids.to(device), positions.to(device), mask.to(device), cache)


def _prefill(model: SwitchableModel, tokens: Tokens) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    if tokens:
        _forward(model, [tokens], [0], torch.ones(1, 0, dtype=torch.bool), cache)
    return cache


def _shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts share, at least one of each left to be fed."""
    first, last = min(prompts), max(prompts)
    n = 0
    while n < min(map(len, prompts)) - 1 and first[n] == last[n]:
        n += 1
    return n


def _batches(rows: list[_Row], shared: int, tokens: int) -> list[list[_Row]]:
    """Rows of like length together, so that little is padded."""
    batches: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: len(r.prompt) + len(r.target), reverse=True):
        if not batches or (len(batches[-1]) + 1) * _length(batches[-1][0], shared) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _length(row: _Row, shared: int) -> int:
    return len(row.prompt) - shared + len(row.target)


def _losses(model: SwitchableModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, list[int]]:
    """Negative log-likelihoods [N] of ``targets`` and the first choices; never all logits at once."""
    losses, choices = [], []
    for rows, wanted in zip(hidden.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True):
        logits = model.logits(rows)
        losses.append(torch.nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="none").cpu())
        choices += logits.argmax(-1).tolist()
    return torch.cat(losses), choices


def _choices(model: SwitchableModel, hidden: Tensor) -> list[int]:
    return [choice for rows in hidden.split(_LOGIT_ROWS) for choice in model.logits(rows).argmax(-1).tolist()]


def _first(counts: list[int], width: int) -> Tensor:
    """Bool [B, width]: true at the first ``counts[b]`` places."""
    return torch.arange(width) < torch.tensor(counts)[:, None]
