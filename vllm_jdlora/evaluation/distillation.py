"""Σ trained a little against the uncompressed adapter: the same bases, the same bytes, closer answers.

min over Σ of E KL(p(·|x; ΔW) ‖ p(·|x; UΣV)) at the answers' tokens of the adapter's own examples, by Adam from the
projected Σ. Only the scaling matrices move (as in LoRA-XS, arXiv 2405.17604, whose training finds adapters in fixed
bases), so nothing changes for serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.scored_logits import scored_logits
from vllm_jdlora.evaluation.training_data import Batch, Example, epoch_order, make_batch
from vllm_jdlora.evaluation.variant import Update

# Batches are padded to multiples of so many tokens: for each new shape of a product in bf16 oneDNN generates kernels
# and keeps them, tens of MB for the lengths of one adapter's examples.
_STEP = 8
ENOUGH = 0.03
"""Nats an answer: distributions of answers that differ by √(0.03 / 2) in total variation at most (Pinsker)."""
# Adam moves an entry by about the learning rate times this slice's root mean square of Σ.
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class DistillationSettings:
    """Steps of Adam with a cosine schedule; the learning rate is in units of each slice's root mean square of Σ.

    enough: adapters that diverge by no more than so many nats an answer are left as they are. By answers and not by
    tokens: a greedy answer stays the same where none of its tokens changes.
    """

    steps: int = 40
    batch: int = 8
    examples: int = 160
    validation: int = 32
    learning_rate: float = 0.02
    max_tokens: int = 192
    enough: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.examples, self.validation) < 1 or self.learning_rate <= 0:
            raise JDLoRAError("steps, batch, examples, validation and learning rate must be positive")


@dataclass(frozen=True)
class Distilled:
    """`sigma` for each slice, and the divergence (nats a token) on held-out examples before and after.

    refitted: that of the candidate Σ, where one was asked for. Where nothing made it fall, `sigma` is what it was.
    """

    sigma: dict[str, Tensor]
    before: float
    after: float
    refitted: float | None = None


class Distiller:
    """A base model whose target modules carry the uncompressed adapter or its compressed form."""

    def __init__(self, model: Any):
        self._model = model.eval().requires_grad_(False)
        self._active: Mapping[str, tuple[Tensor, ...]] = {}
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def distil(
        self,
        adapter: Update,
        bases: Mapping[str, tuple[Tensor, Tensor]],
        sigma: Mapping[str, Tensor],
        examples: Sequence[Example],
        settings: DistillationSettings,
        candidate: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> Distilled:
        """Train Σ of one adapter.

        adapter: its uncompressed factors. bases: slice → (U [d_out, R], V [R, d_in]); sigma: slice → [R, R], or [R]
        (JD-Diag), fp32. examples: the adapter's own (training data); those beyond `settings.examples` are not used.
        candidate: gives another Σ to start from where it diverges less; not called where `sigma` is close enough.
        Raises JDLoRAError for slices that the model lacks, and where the examples are too few to hold some out.
        """
        draw = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(examples), generator=draw).tolist()[: settings.examples + settings.validation]
        held_out = min(settings.validation, len(order) // 4)
        if held_out < 1:
            raise JDLoRAError(f"{len(examples)} examples are too few: give at least 4 for each adapter")
        chosen = [examples[i] for i in order]
        held, used = chosen[:held_out], chosen[held_out:]
        handles = self._hook([*adapter, *sigma])
        try:
            return self._trained(adapter, bases, sigma, held, used, settings, candidate)
        finally:
            self._active = {}
            for handle in handles:
                handle.remove()

    def _trained(
        self,
        adapter: Update,
        bases: Mapping[str, tuple[Tensor, Tensor]],
        sigma: Mapping[str, Tensor],
        held: Sequence[Example],
        used: Sequence[Example],
        settings: DistillationSettings,
        candidate: Callable[[], Mapping[str, Tensor]] | None,
    ) -> Distilled:
        place = next(self._model.parameters())
        teacher = {name: (b.to(place), a.to(place)) for name, (b, a) in adapter.items()}
        cast = {name: (u.to(place), v.to(place)) for name, (u, v) in bases.items()}
        size = settings.batch
        tests = [_in_steps(make_batch(held[i : i + size])) for i in range(0, len(held), size)]

        def student(scalings: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
            return {name: (cast[name][0], scalings[name], cast[name][1]) for name in scalings}

        before = least = self._mean_divergence(tests, teacher, student(sigma))
        best, refitted = dict(sigma), None
        if before * sum(len(test.labels) for test in tests) / len(held) <= settings.enough:
            return Distilled(best, before, before)
        if candidate is not None:
            other = candidate()
            refitted = self._mean_divergence(tests, teacher, student(other))
            if refitted < before:
                best, least = dict(other), refitted
        scale = {name: float(s.square().mean().sqrt()) for name, s in best.items()}
        moves = {name: torch.zeros_like(s, requires_grad=True) for name, s in best.items()}
        start = best

        def moved() -> dict[str, Tensor]:
            return {name: start[name] + scale[name] * moves[name] for name in start}

        optimizer = torch.optim.Adam(moves.values(), lr=settings.learning_rate, betas=_BETAS)
        for step, batch in enumerate(_batches(used, settings)):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2
            loss = _divergence(self._log_probabilities(batch, teacher), self._run(batch, student(moved())))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained = {name: s.detach() for name, s in moved().items()}
        after = self._mean_divergence(tests, teacher, student(trained))
        return (
            Distilled(trained, before, after, refitted) if after < least else Distilled(best, before, least, refitted)
        )

    @torch.no_grad()
    def _log_probabilities(self, batch: Batch, active: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        return self._run(batch, active)

    @torch.no_grad()
    def _mean_divergence(
        self,
        batches: Sequence[Batch],
        teacher: Mapping[str, tuple[Tensor, ...]],
        student: Mapping[str, tuple[Tensor, ...]],
    ) -> float:
        """Over all batches. The teacher's answers are those of one batch at a time: kept while Σ is trained, they
        would take 200 KB for each token of an answer, at a vocabulary of 50,000."""
        total = 0.0
        for batch in batches:
            answer = self._run(batch, teacher)
            total += float(_divergence(answer, self._run(batch, student))) * len(batch.labels)
        return total / sum(len(batch.labels) for batch in batches)

    def _run(self, batch: Batch, active: Mapping[str, tuple[Tensor, ...]]) -> Tensor:
        """Log-probabilities [scored positions, vocabulary] fp32."""
        self._active = active
        return scored_logits(self._model, batch).log_softmax(-1)

    def _hook(self, names: Sequence[str]) -> list[Any]:
        for name in names:
            if name not in self._linears:
                raise JDLoRAError(f"{name}: the base model has no such linear module; is it the adapters' base model?")
        return [self._linears[name].register_forward_hook(self._adding(name)) for name in dict.fromkeys(names)]

    def _adding(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            factors = self._active.get(name)
            if factors is None:
                return output
            if len(factors) == 2:
                b, a = factors
                return output + (inputs[0] @ a.T) @ b.T
            u, sigma, v = factors
            shrunk = inputs[0] @ v.T
            scaled = shrunk * sigma.to(shrunk) if sigma.ndim == 1 else shrunk @ sigma.to(shrunk).T
            return output + scaled @ u.T

        return add


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over positions, nats."""
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def _batches(examples: Sequence[Example], settings: DistillationSettings) -> list[Batch]:
    indices: list[list[int]] = []
    epoch = 0
    while len(indices) < settings.steps:
        indices += epoch_order(examples, settings.batch, settings.seed, epoch)
        epoch += 1
    return [_in_steps(make_batch([examples[i] for i in chosen])) for chosen in indices[: settings.steps]]


def _in_steps(batch: Batch) -> Batch:
    """The same batch with lengths that are multiples of a step, so that they recur: the end of the common start is run
    for each example, and examples are padded further."""
    start = batch.prefix.shape[1] // _STEP * _STEP
    own = batch.prefix[:, start:].expand(len(batch.ids), -1)
    ahead, behind = own.shape[1], -(own.shape[1] + batch.ids.shape[1]) % _STEP
    return Batch(
        prefix=batch.prefix[:, :start],
        ids=nn.functional.pad(torch.cat([own, batch.ids], 1), (0, behind)),
        mask=nn.functional.pad(nn.functional.pad(batch.mask, (ahead, 0), value=True), (0, behind)),
        scored=nn.functional.pad(batch.scored, (ahead, behind)),
        labels=batch.labels,
    )
