"""What a study is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.baseline_variants import BASELINES
from vllm_jdlora.evaluation.distillation import DistillationSettings
from vllm_jdlora.evaluation.scoring import MAX_NEW_TOKENS

PARTS = ("ours", "baselines", "sweep", "ranks", "leakage", "convergence", "long")
"""In the order in which they run."""
BUDGETS = (Fraction(1, 32), Fraction(1, 16), Fraction(1, 8), Fraction(1, 4))
FEW_ITEMS = 24
"""Test items of each task where many variants are compared by their loss (sweep, leakage), unless there is a limit."""
_REFERENCE = Fraction(1, 8)


@dataclass(frozen=True)
class StudySettings:
    """Checked once, here.

    Attributes:
        output: folder of records, collections, summary and plots.
        base_model: Hugging Face folder.
        adapters: PEFT folders, or folders of them.
        tasks: folder of NAME.jsonl for each adapter NAME.
        parts: of `PARTS`.
        budgets: shares of the uncompressed bytes.
        limit: first N test items of each task; None: all (`FEW_ITEMS` in sweep and leakage).
        only: names of the adapters to measure; all are compressed.
        dtype: of the model.
        calibration: text or moments that fits weigh by; None: the package's text.
        long: adapters of the same names, trained longer.
        distillation: how Σ is distilled, for a second row of each collection of the part "ours"; None: it is not.
        method, metric: of the part "ours", as `jdlora compress` takes them; the metric is that of all collections.
        baselines: methods to compare with.
        baseline_budgets: shares of the bytes for the baselines; None: as `budgets`.
        baseline_limit: as `limit`, for baselines and ours beside them; None: as `limit`.
        answers_for: baselines whose greedy answers are measured too; None: all.
        max_new_tokens: limit of an answer.
        leakage_pairs: at most so many pairs of each kind.
    """

    output: Path
    base_model: Path
    adapters: Sequence[Path]
    tasks: Path
    parts: Sequence[str]
    budgets: Sequence[Fraction] = BUDGETS
    limit: int | None = None
    only: Sequence[str] | None = None
    dtype: str = "fp32"
    calibration: Path | None = None
    long: Path | None = None
    method: str = "full"
    metric: str = "activation"
    distillation: DistillationSettings | None = None
    baselines: Sequence[str] = BASELINES
    baseline_budgets: Sequence[Fraction] | None = None
    baseline_limit: int | None = None
    answers_for: Sequence[str] | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    leakage_pairs: int | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise JDLoRAError(f"no part named {unknown[0]!r}: choose from {', '.join(PARTS)}")
        if "long" in self.parts and self.long is None:
            raise JDLoRAError("the part 'long' needs adapters that were trained longer: give their folder as --long")
        if not self.budgets:
            raise JDLoRAError("give at least one --budget, such as 1/8")

    @property
    def family(self) -> str:
        """Name of the part "ours" in tables and plots."""
        changed = [value for value, usual in ((self.method, "full"), (self.metric, "activation")) if value != usual]
        return ", ".join(["ours", *changed])

    @property
    def methods(self) -> Sequence[str]:
        """Those that a choice is made from."""
        return ("full", "diag") if self.method == "auto" else (self.method,)

    @property
    def reference_budget(self) -> Fraction:
        """Whose rank and clusters the ablations take: 1/8 if it is among the budgets, else the largest."""
        return _REFERENCE if _REFERENCE in self.budgets else max(self.budgets)
