"""The GPU serving path: vLLM's LoRA layers over our kernels, without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

CHECKS = Path(__file__).with_name("punica_gpu_checks.py")
OFFLINE_TRITON = Path(__file__).parents[1] / "offline_triton.py"


def run_checks(*options: str) -> None:
    command = [sys.executable, str(OFFLINE_TRITON), "check", str(CHECKS), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_vllm_layers_on_interpreted_kernels_equal_the_reference():
    run_checks()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_vllm_layers_on_compiled_kernels_equal_the_reference():
    run_checks("--native")
