"""Records made by hand, for what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_jdlora.evaluation.records import Record


def record(
    variant: str,
    adapter: str,
    rouge: Sequence[float],
    *,
    task: str | None = None,
    losses: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    correct: Sequence[int] | None = None,
    size: int = 800,
    error: float = 0.5,
    answers: bool = True,
) -> Record:
    """One record of two adapters' bytes whose items have these scores."""
    n = len(rouge)
    losses, tokens, correct = losses or [1.0] * n, tokens or [2] * n, correct or [1] * n
    return Record(
        key=f"{variant} {adapter} {task}",
        variant=variant,
        adapter=adapter,
        task=task or adapter,
        bytes=size,
        adapters=2,
        relative_error=error,
        output_error=None,
        loss=sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens),
        token_accuracy=sum(correct) / sum(tokens),
        exact_match=sum(rouge) / n if answers else None,
        rouge_l=sum(rouge) / n if answers else None,
        agreement=1.0 if answers else None,
        agreement_with_base=0.0 if answers else None,
        losses=list(losses),
        tokens=list(tokens),
        correct=list(correct),
        exact=[int(x) for x in rouge] if answers else [],
        rouge=list(rouge) if answers else [],
        agrees=[1] * n if answers else [],
        answers=["x"] * n if answers else [],
    )
