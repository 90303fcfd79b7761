"""The part "convergence": the energy lost after each round, by method and start, on a few slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vllm_jdlora.collection.source import AdapterSource, common_slices
from vllm_jdlora.evaluation.study.part import Part
from vllm_jdlora.evaluation.study.study import Study
from vllm_jdlora.jd.diag import fit_diag
from vllm_jdlora.jd.full import fit_full
from vllm_jdlora.jd.problem import Factors, SliceProblem
from vllm_jdlora.jd.published import ALTERNATIONS, bases, unit_members

SLICES = 4
RANK = 16
SEEDS = 3
SWEEPS = 60
_CURVES = ("JD-Full, HOSVD start", "JD-Full as published, random starts", "JD-Diag")


def convergence(study: Study) -> Part:
    """All adapters in one cluster, in the Frobenius metric: what every method can be run on.

    Energy lost: Σ‖ΔW − UΣV‖² of adapters of norm one, as a share, the mean over slices (and, as published, seeds).
    Round 0 is the start. Fits that end earlier stay at their last value.
    """
    adapters = [adapter for adapter in study.adapters if not adapter.plain_only]
    source = AdapterSource(adapters, common_slices(adapters))
    count = min(SLICES, len(source.slice_names))
    indices = [int((i + 0.5) * len(source.slice_names) / count) for i in range(count)]
    study.begin("convergence", count)
    what = {
        "convergence": [source.slice_names[index] for index in indices],
        "adapters": [adapter.sha256 for adapter in adapters],
        "settings": [RANK, SEEDS, SWEEPS],
    }
    curves: dict[str, list[float]] | None = study.steps.find(what)
    if curves is None:
        found: dict[str, list[list[float]]] = {name: [] for name in _CURVES}
        for index in indices:
            factors = source.factors(index)
            for name, curve in _of_slice(factors, source.slice_names[index]):
                found[name].append(curve)
            study.tick()
        curves = {name: _mean(parts) for name, parts in found.items()}
        study.steps.add("convergence", what, curves)
    else:
        study.tick(count)
    return Part(facts={"energy_lost": curves, "slices": what["convergence"], "most_rank": RANK})


def _of_slice(factors: Sequence[Factors | None], name: str) -> Iterator[tuple[str, list[float]]]:
    problem = SliceProblem.from_factors(factors, name)
    n = max(1, len(problem))
    # In all directions of the stack every start is exact.
    rank = max(1, min(RANK, problem.rows // 2, problem.bt.shape[1] - 1, problem.a.shape[1] - 1))
    yield _CURVES[0], [max(0.0, 1 - captured / n) for captured in fit_full(problem, rank, max_sweeps=SWEEPS).captured]
    members = list(unit_members(factors).values())
    for seed in range(SEEDS):
        lost = []
        for rounds in range(ALTERNATIONS + 1):
            u, v = bases(members, rank, seed, alternations=rounds)
            held = [float(((u.T @ b) @ (a @ v)).double().square().sum()) for b, a in members]
            lost.append(max(0.0, 1 - sum(held) / n))
        yield _CURVES[1], lost
    yield _CURVES[2], [lost / n for lost in fit_diag(problem, rank).objective]


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    length = max(map(len, curves))
    padded = torch.tensor([[*curve, *[curve[-1]] * (length - len(curve))] for curve in curves], dtype=torch.float64)
    return [float(value) for value in padded.mean(0)]
