"""The part "baselines": every other method at each budget."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

from vllm_jdlora.evaluation.baseline_variants import baseline
from vllm_jdlora.evaluation.study.comparison import Comparison
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.evaluation.summary import summarise
from vllm_jdlora.evaluation.variant import Variant


def baselines(study: Study) -> Part:
    settings = study.settings
    limit = settings.limit if settings.baseline_limit is None else settings.baseline_limit
    comparison = Comparison(study, "baselines", study.adapters, study.measured, limit)
    shares = settings.budgets if settings.baseline_budgets is None else settings.baseline_budgets
    study.begin("baselines", (2 + len(settings.baselines) * len(shares)) * len(comparison.tasks))
    with_answers = set(settings.baselines if settings.answers_for is None else settings.answers_for)
    records = comparison.references(answers=bool(with_answers))
    for name in settings.baselines:
        for share in shares:
            records += comparison.measure(
                f"{name}: {share}",
                {"baseline": name, "budget": str(share), "calibration": study.weighted_by},
                partial(_fitted, study, name, share),
                answers=name in with_answers,
            )
    return Part({"": summarise(records)}, records)


def _fitted(study: Study, name: str, share: Fraction) -> Variant:
    # Moments by the method, whatever the metric of ours: those that use them are named after them.
    moments = study.moments("fisher" if "fisher" in name else "activation")
    inputs, gradients = {}, {}
    if moments is not None:
        inputs = {part: moments.of(part) for part in moments.inputs}
        gradients = {part: moments.matrices[key] for part, key in moments.gradients.items()}
    budget = study.bytes_at(share)
    return baseline(name, study.adapters, budget, second_moments=inputs, gradients=gradients, progress=False)
