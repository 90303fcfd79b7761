"""What every compiled launch must keep; ``test_triton_resources*.py`` hold the launches of one width of bases to it.

The record is ``triton_resources.json``; after a wanted change: ``python tests/offline_triton.py compile --record``.
"""

from __future__ import annotations

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


class ResourceGates:
    """Every launch compiles for every GPU we name, without spills or narrow weight loads, at the resources on record.

    Attributes:
        base_bits: of the bases whose launches are compiled: 16, or 8 beside 16.
    """

    base_bits: int

    @pytest.fixture(scope="class")
    def compiled(self, request: pytest.FixtureRequest) -> list[dict]:
        command = [sys.executable, str(OFFLINE_TRITON), "compile", "--base-bits", str(request.cls.base_bits)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_every_launch_compiles_for_every_architecture_without_spills(self, compiled: list[dict]) -> None:
        assert {row["architecture"] for row in compiled} == ARCHITECTURES
        assert [row for row in compiled if row["spilled_bytes"]] == []

    def test_nothing_is_loaded_two_bytes_at_a_time(self, compiled: list[dict]) -> None:
        """Stock kernels do in packed modules, where weights are reached through a table of addresses."""
        assert [row for row in compiled if row["narrow_loads"] or row["narrow_copies"]] == []

    def test_no_launch_multiplies_with_asynchronous_tensor_cores(self, compiled: list[dict]) -> None:
        """Their code for kernels of this kind gives NaN (triton-lang/triton#9433)."""
        assert [row for row in compiled if row["asynchronous_tensor_cores"]] == []

    def test_every_launch_fits_the_smallest_gpu(self, compiled: list[dict]) -> None:
        assert max(row["shared_bytes"] for row in compiled) <= SHARED_BYTES_OF_THE_SMALLEST

    def test_registers_and_shared_memory_are_those_on_record(self, compiled: list[dict]) -> None:
        """To the last register with the compiler of the record; within a fifth with another."""
        on_record = {name for name in RESOURCES["launches"] if _base_bits(name) == self.base_bits}
        assert {row["launch"] for row in compiled} == on_record
        slack = 1.0 if triton.__version__ == RESOURCES["triton"] else 1.2
        grown = []
        for row in compiled:
            registers, shared = RESOURCES["launches"][row["launch"]][f"sm_{row['architecture']}"]
            if row["registers"] > registers * slack or row["shared_bytes"] > shared * slack:
                grown.append((row, registers, shared))
        assert grown == []


def _base_bits(launch: str) -> int:
    return 8 if launch.startswith(("int8 ", "fp8 ")) else 16
