"""Every launch compiles for every GPU we name, without spills or narrow weight loads, at the resources on record.

The record is ``triton_resources.json``; after a wanted change: ``python tests/offline_triton.py compile --record``.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

OFFLINE_TRITON = Path(__file__).parents[1] / "offline_triton.py"
RESOURCES = json.loads(Path(__file__).with_name("triton_resources.json").read_text())
ARCHITECTURES = {80, 89, 90, 100, 120}
SHARED_BYTES_OF_THE_SMALLEST = 99 * 1024  # sm_89 and sm_120


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    command = [sys.executable, str(OFFLINE_TRITON), "compile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_launch_compiles_for_every_architecture_without_spills(compiled):
    assert {row["architecture"] for row in compiled} == ARCHITECTURES
    assert [row for row in compiled if row["spilled_bytes"]] == []


def test_nothing_is_loaded_two_bytes_at_a_time(compiled):
    """Stock kernels do in packed modules, where weights are reached through a table of addresses."""
    assert [row for row in compiled if row["narrow_loads"] or row["narrow_copies"]] == []


def test_no_launch_multiplies_with_asynchronous_tensor_cores(compiled):
    """Their code for kernels of this kind gives NaN (triton-lang/triton#9433)."""
    assert [row for row in compiled if row["asynchronous_tensor_cores"]] == []


def test_every_launch_fits_the_smallest_gpu(compiled):
    assert max(row["shared_bytes"] for row in compiled) <= SHARED_BYTES_OF_THE_SMALLEST


def test_registers_and_shared_memory_are_those_on_record(compiled):
    """To the last register with the compiler of the record; within a fifth with another."""
    assert {row["launch"] for row in compiled} == set(RESOURCES["launches"])
    slack = 1.0 if triton.__version__ == RESOURCES["triton"] else 1.2
    grown = []
    for row in compiled:
        registers, shared = RESOURCES["launches"][row["launch"]][f"sm_{row['architecture']}"]
        if row["registers"] > registers * slack or row["shared_bytes"] > shared * slack:
            grown.append((row, registers, shared))
    assert grown == []
