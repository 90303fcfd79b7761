"""Compiled kernels come back from disk in another process, and what is wrong with a file costs time only."""

import ctypes
import logging
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba.core import types

from vllm_jdlora.kernels import cpu_machine_code
from vllm_jdlora.kernels.cpu_numbers import address_as_pointer

KERNELS = """
import sys, torch
from vllm_jdlora.kernels import cpu_body, cpu_machine_code, cpu_operator
from vllm_jdlora.kernels.cpu_layout import Form
if "kept" in sys.argv:
    def refuse(function):
        raise AssertionError("compiled again")
    cpu_machine_code._object_of = refuse
cpu_body.compiling(Form.here(torch.float32), 8).result()
torch.library.define("kept::linear_", "(Tensor(a!) y, Tensor x, Tensor handle) -> ()")
cpu_operator.implement("kept", "linear_")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / cpu_machine_code.FOLDER


def doubling():
    @numba.cfunc(types.void(types.int64), error_model="numpy")
    def double(address):
        numba.carray(address_as_pointer(address), 1, np.int64)[0] *= 2

    return double


def doubled(number: int, address: int) -> int:
    room = ctypes.c_int64(number)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(room))
    return room.value


def never():
    raise AssertionError("compiled again")


def test_the_second_time_nothing_is_compiled(cache):
    assert doubled(21, cpu_machine_code.compiled("double", 1, doubling)) == 42
    assert doubled(4, cpu_machine_code.compiled("double", 1, never)) == 8
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("other", [("double", 2), ("twice", 1)])
def test_what_it_is_made_of_tells_code_apart(other):
    cpu_machine_code.compiled("double", 1, doubling)
    with pytest.raises(AssertionError, match="again"):
        cpu_machine_code.compiled(*other, never)


@pytest.mark.parametrize("what", ["_sources", "_processor"])
def test_other_sources_or_another_processor_want_other_code(monkeypatch, what):
    cpu_machine_code.compiled("double", 1, doubling)
    monkeypatch.setattr(cpu_machine_code, what, lambda: ("other", "+sse2"))
    with pytest.raises(AssertionError, match="again"):
        cpu_machine_code.compiled("double", 1, never)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"?", lambda data: b""])
def test_a_damaged_file_is_made_anew(cache, caplog, damage):
    cpu_machine_code.compiled("double", 1, doubling)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert doubled(3, cpu_machine_code.compiled("double", 1, doubling)) == 6
    assert "made anew" in caplog.text
    assert doubled(3, cpu_machine_code.compiled("double", 1, never)) == 6


def test_where_nothing_can_be_kept_it_is_compiled_each_time(cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert doubled(5, cpu_machine_code.compiled("double", 1, doubling)) == 10
    assert "not kept" in caplog.text


def test_another_process_runs_the_kept_kernels(tmp_path, cache, monkeypatch):
    def run(*arguments):
        done = subprocess.run([sys.executable, "-c", KERNELS, *arguments], capture_output=True, text=True)
        assert not done.returncode, done.stderr

    run()
    files = {file.name: file.read_bytes() for file in cache.iterdir()}
    assert len(files) == 3
    run("kept")
    # No address of the process that made it is in the code: addresses differ from process to process.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "other"))
    run()
    assert {file.name: file.read_bytes() for file in (tmp_path / "other" / cache.name).iterdir()} == files
