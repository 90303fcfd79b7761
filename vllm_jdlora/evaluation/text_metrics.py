"""ROUGE-L of one answer."""

from __future__ import annotations

from functools import cache
from typing import Any


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (package rouge-score, with stemming), in [0, 1].

    The package counts letters and digits only: a reference without any is scored by exact match.
    """
    if not any(c.isascii() and c.isalnum() for c in reference):
        return float(reference.strip() == answer.strip())
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
