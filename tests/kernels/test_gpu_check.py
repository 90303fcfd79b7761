"""``make gpu-check``: right in the interpreter, one clear line without a GPU, needs torch and triton only."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "kernels" / "gpu_check.py"
CHECKS = Path(__file__).with_name("gpu_check_checks.py")


def test_the_interpreted_program_checks_and_measures():
    command = [sys.executable, str(ROOT / "tests" / "offline_triton.py"), "check", str(CHECKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip().splitlines() == ["gpu-check: no NVIDIA GPU that this torch can use; nothing was checked"]


ONLY_TORCH_AND_TRITON = """
import sys
for name in ("vllm", "numba", "transformers", "peft", "safetensors", "rich"):
    sys.modules[name] = None
sys.argv[0] = sys.argv[1]
import importlib.machinery, runpy
# Not installed: only the checkout is there.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
scope = runpy.run_path(sys.argv[1], run_name="not main")
sys.path[0] = sys.argv[2]
import vllm_jdlora
vllm_jdlora.__path__.append(sys.argv[2])
import vllm_jdlora.kernels.gpu_bench as bench
print(bench.stock_launches(bench.ModuleShape(16, (16,)), 1, 1, "cpu", bench.torch.float16))
"""


def test_from_a_checkout_it_needs_nothing_else():
    command = [sys.executable, "-c", ONLY_TORCH_AND_TRITON, str(PROGRAM), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stdout + done.stderr
