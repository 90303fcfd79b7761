"""The Triton Σ kernel: right in the interpreter, compilable for every GPU we name, refused clearly without Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHECKS = Path(__file__).with_name("triton_sigma_checks.py")
OFFLINE_TRITON = Path(__file__).parents[1] / "offline_triton.py"


def run(*command: str | Path) -> str:
    """Standard output of a Python process of its own; its whole output on failure."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_interpreted_kernel_equals_the_reference():
    assert " passed" in run(OFFLINE_TRITON, "check", CHECKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_kernel_equals_the_reference():
    assert " passed" in run(OFFLINE_TRITON, "check", CHECKS, "--native")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return [json.loads(line) for line in run(OFFLINE_TRITON, "compile").splitlines()]


def test_it_compiles_for_every_architecture_without_spills(compiled):
    assert {row["architecture"] for row in compiled} == {80, 89, 90, 100, 120}
    assert [row for row in compiled if row["spilled_bytes"]] == []


def test_compiled_scalings_are_read_16_bytes_at_a_time(compiled):
    assert [row for row in compiled if row["widest_load_bits"] != 128] == []


def test_compiled_warps_hold_the_row_before_any_of_them_overwrites_it(compiled):
    """The interpreter runs one thread after another and cannot see this race."""
    full = [row for row in compiled if row["kernel"] == "sigma_full_kernel"]
    assert full and all(row["barrier_precedes_stores"] for row in full)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels import triton_sigma
h, sigma, slots = torch.ones(1, 2, 8), torch.ones(1, 1, 8, 8), torch.zeros(2, dtype=torch.int32)
try:
    torch.ops.vllm_jdlora.sigma_(h, sigma, slots, torch.tensor([False]))
except JDLoRAError as error:
    print(error)
"""


def test_without_triton_it_imports_and_says_what_to_install():
    assert "install vllm-jdlora[cuda]" in run("-c", WITHOUT_TRITON)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do take CPU tensors")
def test_cpu_tensors_are_refused_with_the_way_out():
    from vllm_jdlora.errors import JDLoRAError
    from vllm_jdlora.kernels.triton_sigma import jd_sigma_

    with pytest.raises(JDLoRAError, match="cpu_grouped"):
        jd_sigma_(torch.ones(1, 2, 8), torch.ones(1, 1, 8, 8), torch.zeros(2, dtype=torch.int32), torch.tensor([False]))
