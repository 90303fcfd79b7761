"""The Triton kernels in the interpreter or on a GPU, and what is said where they cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

CHECKS = Path(__file__).with_name("triton_grouped_checks.py")
OFFLINE_TRITON = Path(__file__).parents[1] / "offline_triton.py"


def run(*command: str | Path) -> str:
    """Standard output of a Python process of its own; its whole output on failure."""
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_interpreted_kernels_equal_the_reference():
    assert " passed" in run(OFFLINE_TRITON, "check", CHECKS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_kernels_equal_the_reference():
    assert " passed" in run(OFFLINE_TRITON, "check", CHECKS, "--native")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.kernels.token_tiles import TokenTiles
from vllm_jdlora.kernels.triton_grouped import GroupedLoRA
try:
    GroupedLoRA(TokenTiles(8, 1, "cpu"), "cpu")
except JDLoRAError as error:
    print(error)
"""


def test_without_triton_they_import_and_say_what_to_install():
    assert "install vllm-jdlora[cuda]" in run("-c", WITHOUT_TRITON)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do take CPU tensors")
def test_the_cpu_is_refused_with_the_way_out():
    from vllm_jdlora.errors import JDLoRAError
    from vllm_jdlora.kernels.token_tiles import TokenTiles
    from vllm_jdlora.kernels.triton_grouped import GroupedLoRA

    with pytest.raises(JDLoRAError, match="cpu_grouped"):
        GroupedLoRA(TokenTiles(8, 1, "cpu"), "cpu")
