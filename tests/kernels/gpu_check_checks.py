"""The program for GPUs does what it says, on sizes that Triton's interpreter can do: the day of the first GPU is no day
for typing errors.

Not collected by itself: ``test_gpu_check.py`` runs this file in a process where Triton is interpreted.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from offline_triton import import_vllm_lora_kernels

    import_vllm_lora_kernels()

from unittest import mock

import pytest
import torch
from vllm.lora.ops.triton_ops import lora_shrink_op

from vllm_jdlora.kernels import gpu_bench, gpu_check
from vllm_jdlora.kernels.gpu_problem import make_problem
from vllm_jdlora.kernels.traffic import ModuleShape

TINY = {"qkv": ModuleShape(64, (32, 16, 16)), "o": ModuleShape(48, (64,))}
SIZES = {"tokens": (1, 5), "clusters": (1, 3), "ranks": (16,)}


def test_results_of_every_dtype_variant_and_mix_are_compared(monkeypatch):
    # The interpreter cuts bf16 off instead of rounding it.
    monkeypatch.setitem(gpu_check.TOLERANCE, "bfloat16", 8e-3)
    # Ranks are the matter of the kernels' own tests.
    assert gpu_check.check_results("cpu", [(40, (16, 16))], (3,), ranks=(8,)) == 2 * 6 * 4


@pytest.mark.parametrize("broken", ["values", "base rows"])
def test_wrong_results_are_told(broken):
    problem = make_problem(48, (32,), rank=16, clusters=2, slots=4, tokens=3, dtype=torch.float16, device="cpu")
    slots = [1, -1, 2]
    problem.step(slots)
    y = problem.run_(problem.y.clone())
    gpu_check.require_equal(problem, y, "right")
    y[0 if broken == "values" else 1, 0] += 1
    with pytest.raises(gpu_check.CheckFailed, match="relative error" if broken == "values" else "base model"):
        gpu_check.require_equal(problem, y, "wrong")


def test_every_condition_of_the_benchmark_runs():
    stock = lora_shrink_op.get_lora_op_configs

    def once(run) -> float:
        run()
        return 2.0

    with mock.patch.object(lora_shrink_op, "get_lora_op_configs", lambda *a, **k: stock(*a, **k) | {"split_k": 2}):
        rows = list(gpu_bench.benchmark(shapes=TINY, sizes=SIZES, device="cpu", dtype=torch.float16, timer=once))
    # For each module and batch: the base, uncompressed adapters, and ours beside vLLM's for each number of clusters.
    ours = {"ours", "ours, by cluster", "ours, all clusters", "ours, int8", "ours, fp8"}
    assert len(rows) == 2 * 2 * (2 + 2 * (len(ours) + 1))
    assert {row["who"] for row in rows} == {"base", "ours, uncompressed", "vllm, equal memory"} | ours
    for row in rows:
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / 2e3)
        assert str(row["tokens"]) in gpu_bench.readable(row)


def test_vllm_gets_as_many_slots_as_take_our_memory():
    shape = ModuleShape(64, (32, 16))
    assert gpu_bench.equal_memory_slots(shape, 0, 16, 7) == 7
    assert gpu_bench.equal_memory_slots(shape, 1, 8, 1) == 1
    # 2 slices · 64 + 48 numbers a rank, 64 tokens · 2 slices · 16² of scalings: 32768 / (16 · 176) more
    assert gpu_bench.equal_memory_slots(shape, 64, 16, 7) == 7 + 11
