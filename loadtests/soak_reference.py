"""Are the sampled answers of the soak test those of their adapter: HF transformers in fp32, its ΔW merged.

ΔW comes from the content's seeds, not from the collection's files or anything of the package. A name may have had
several contents between a request and its answer; any of them will do.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from soak_adapters import BASE, Content, History, churn_adapters
from soak_traffic import Answer
from workload import Trace

from tests import reference


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from the reference, nats.

    Attributes:
        logprob: mean over its tokens of the difference of a log-probability.
        behind: of the chosen token's log-probability in the reference below that of the best one: near-ties.
    """

    logprob: float
    behind: float


TOLERANCES = {
    # fp32 on both sides through thirty layers.
    "float32": Tolerance(2e-3, 2e-3),
    # Activations and Σ are rounded. Found were 0.11 and 0.37, and for another adapter's answer 0.45 and 3.0 or more.
    "bfloat16": Tolerance(0.3, 1.2),
}


@dataclass(frozen=True)
class Distance:
    """Of an answer from what a content gives; as in `Tolerance`."""

    logprob: float
    behind: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.logprob <= tolerance.logprob and self.behind <= tolerance.behind


@dataclass
class Checked:
    """What the check found.

    Attributes:
        answers: checked, of so many `contents`.
        wrong: answers of no content that their name had.
        farthest: the largest distances of right answers.
        others: comparisons with a content that the answer is not of; `confused`: those that passed all the same.
        nearest_other: the smallest distances there.
    """

    answers: int = 0
    contents: int = 0
    wrong: list[str] = field(default_factory=list)
    farthest: Distance = Distance(0.0, 0.0)
    others: int = 0
    confused: int = 0
    nearest_other: Distance = Distance(float("inf"), float("inf"))

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("answers", "contents", "others", "confused")},
            "wrong": len(self.wrong),
            "examples": self.wrong[:5],
            "farthest": _rounded(self.farthest),
            "nearest_other": _rounded(self.nearest_other) if self.others else None,
        }


def check_answers(
    model_folder: Path,
    answers: Sequence[Answer],
    history: History,
    trace: Trace,
    vocabulary: int,
    tolerance: Tolerance,
    on_checked: Callable[[], None],
) -> Checked:
    """Compare each answer with the contents that its name had, and every fourth with another content as well."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    draw = random.Random(0)
    asked: dict[Content | None, list[Answer]] = defaultdict(list)
    possible = {id(a): contents_of(a, history) for a in answers}
    for answer in answers:
        for content in possible[id(answer)]:
            asked[content].append(answer)
    best: dict[int, Distance] = {}
    result = Checked(contents=len(asked))
    for content, own in asked.items():
        with torch.no_grad(), reference.merged(model, churn_adapters.deltas(model_folder, content)) as merged:
            for answer in own:
                found = distance(merged, trace.prompt_ids(answer.index, vocabulary), answer)
                if id(answer) not in best or found.logprob < best[id(answer)].logprob:
                    best[id(answer)] = found
                on_checked()
            if draw.random() < 0.25 and (strangers := [a for a in answers if content not in possible[id(a)]]):
                stranger = draw.choice(strangers)
                found = distance(merged, trace.prompt_ids(stranger.index, vocabulary), stranger)
                result.others += 1
                result.confused += found.within(tolerance)
                result.nearest_other = min(result.nearest_other, found, key=lambda d: d.logprob)
    for answer in answers:
        result.answers += 1
        found = best.get(id(answer), Distance(float("inf"), float("inf")))
        if found.within(tolerance):
            worst = result.farthest
            result.farthest = Distance(max(worst.logprob, found.logprob), max(worst.behind, found.behind))
        else:
            result.wrong.append(f"{answer.name}, request {answer.index}: {found}")
    return result


def contents_of(answer: Answer, history: History) -> list[Content | None]:
    """What the answer may be of; None: the base model. An adapter that is unknown is no base model."""
    found = history.possible(answer.name, answer.sent, answer.ended)
    return [content for content in found if content is not None or answer.name == BASE]


def distance(model: Any, prompt: Sequence[int], answer: Answer) -> Distance:
    """Of a greedy answer from this model's log-probabilities of the same tokens after the same prompt."""
    tokens = answer.token_ids
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1)
    chosen = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
    differences = (chosen - torch.tensor(answer.timing.logprobs)).abs()
    return Distance(differences.mean().item(), (expected.max(-1).values - chosen).max().item())


def _rounded(found: Distance) -> dict[str, float]:
    return {"logprob": round(found.logprob, 4), "behind": round(found.behind, 4)}
