"""Loss of reference answers and greedy answers of one adapter on one task, in as few forward passes as possible.

Two things save time and change nothing in the results. The tokens that all prompts of a task share (the
instruction) go through the model once, and their keys and values are shared. And greedy decoding verifies drafts
(speculative decoding with known texts): the forward pass that scores the reference answer also says where greedy
decoding leaves it; only from there on are tokens generated, again along a draft where one fits (the answer of
the uncompressed adapter, say), and one by one where none does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_jdlora.evaluation.attention import joined, new_cache, picked, repeated
from vllm_jdlora.evaluation.model import SwitchableModel

MAX_NEW_TOKENS = 64
_BATCH_TOKENS = 512
_POOL_TOKENS = 8192
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
    pool: list[_Open] = []
    for batch in _batches(rows, shared, batch_tokens):
        scored = _score_batch(model, batch, prefix, shared, max_new_tokens)
        if answers:
            pool += _along_drafts(model, scored, max_new_tokens)
        if sum(part.visible.numel() for part in pool) > _POOL_TOKENS:
            _to_the_end(model, pool, max_new_tokens)
            pool = []
    _to_the_end(model, pool, max_new_tokens)
    return [Score(r.loss, len(r.target), r.correct, r.answer if answers else None) for r in rows]


@dataclass
class _Open:
    """Rows of one batch whose answers are not at their end; the last token of each answer has not been fed yet.

    ``visible`` [B, S] says which keys of the cache belong to a row's text: not padding, not a rejected draft.
    """

    rows: list[_Row]
    visible: Tensor
    cache: Any

    def only(self, wanted: list[int]) -> _Open:
        """Some of the rows; empty lists are fine."""
        if len(wanted) == len(self.rows):
            return self
        cache = picked(self.cache, wanted) if wanted else None
        return _Open([self.rows[i] for i in wanted], self.visible[wanted], cache)


def _score_batch(model: SwitchableModel, rows: list[_Row], prefix: Any, shared: int, limit: int) -> _Open:
    """Fill in loss and correctness, and the answers as far as the reference carries them."""
    cache = repeated(prefix, len(rows))
    visible = torch.ones(len(rows), shared, dtype=torch.bool)
    fed = [row.prompt[shared:] + row.target[:-1] for row in rows]
    begins = [len(row.prompt) - shared - 1 for row in rows]
    hidden = _forward(model, fed, [shared] * len(rows), visible, cache)
    wanted = torch.cat(
        [hidden[i, begin : begin + len(row.target)] for i, (row, begin) in enumerate(zip(rows, begins, strict=True))]
    )
    losses, choices = _losses(model, wanted, torch.tensor([t for row in rows for t in row.target]))
    at, kept = 0, []
    for row, begin in zip(rows, begins, strict=True):
        chosen = choices[at : at + len(row.target)]
        row.loss = float(losses[at : at + len(row.target)].mean())
        row.correct = sum(a == b for a, b in zip(chosen, row.target, strict=True))
        kept.append(begin + row.accept(chosen, row.target, model.end, limit))
        at += len(row.target)
    visible = torch.cat([visible, _first(kept, max(map(len, fed)))], dim=1)
    return _Open(rows, visible, cache).only([i for i, row in enumerate(rows) if not row.done])


def _along_drafts(model: SwitchableModel, part: _Open, limit: int) -> list[_Open]:
    """Verify drafts as long as one fits; what is left, none fits any more."""
    left = []
    while part.rows:
        fits = [bool(row.continuation()) for row in part.rows]
        left.append(part.only([i for i, fit in enumerate(fits) if not fit]))
        part = _step(model, part.only([i for i, fit in enumerate(fits) if fit]), limit)
    return [rest for rest in left if rest.rows]


def _to_the_end(model: SwitchableModel, pool: list[_Open], limit: int) -> None:
    """Decode token by token, all together."""
    if not pool:
        return
    rows = [row for part in pool for row in part.rows]
    width = max(int(part.visible.sum(dim=1).max()) for part in pool)
    cache = joined([(part.cache, part.visible) for part in pool], width)
    part = _Open(rows, _first([int(n) for p in pool for n in p.visible.sum(dim=1)], width), cache)
    while part.rows:
        part = _step(model, part, limit)


def _step(model: SwitchableModel, part: _Open, limit: int) -> _Open:
    """One forward pass over the last token of each answer and what its draft says comes next; what is still open."""
    rows = part.rows
    if not rows:
        return part
    expected = [row.continuation()[: limit - len(row.answer)] for row in rows]
    fed = [[row.answer[-1], *following[:-1]] for row, following in zip(rows, expected, strict=True)]
    starts = [len(row.prompt) + len(row.answer) - 1 for row in rows]
    hidden = _forward(model, fed, starts, part.visible, part.cache)
    lengths = [len(tokens) for tokens in fed]
    choices = _choices(model, torch.cat([hidden[i, :n] for i, n in enumerate(lengths)]))
    at, kept = 0, []
    for row, following, n in zip(rows, expected, lengths, strict=True):
        kept.append(row.accept(choices[at : at + n], following, model.end, limit))
        at += n
    visible = torch.cat([part.visible, _first(kept, max(lengths))], dim=1)
    return _Open(rows, visible, part.cache).only([i for i, row in enumerate(rows) if not row.done])


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
    cache = new_cache()
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
