"""Files of tensors: what is read is what safetensors reads, and a change beneath an open file is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.tensor_file import TensorFile, identity_of, read_again

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "small": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    "bytes": torch.arange(7, dtype=torch.int8),
    "number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"who": "me"})
    return tmp_path / "x.safetensors"


def test_what_is_read_is_what_safetensors_reads(file):
    opened, expected = TensorFile(file), load_file(file)
    assert set(opened.tensors) == set(expected) and opened.metadata == {"who": "me"}
    for name, tensor in expected.items():
        found = opened.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float()), name
    for row in range(5):
        assert torch.equal(opened.read("half", row), expected["half"][row])
    with pytest.raises(IndexError):
        opened.read("half", 5)


def test_a_tensor_that_was_read_is_nobody_elses(file):
    opened = TensorFile(file)
    opened.read("matrix").zero_()
    assert torch.equal(opened.read("matrix"), TENSORS["matrix"])


def test_reading_again_needs_no_header_and_notices_another_file(file):
    opened = TensorFile(file)
    places = [opened.tensors[name] for name in ("half", "matrix")]
    half, matrix = read_again(file, opened.identity, places)
    assert torch.equal(half, TENSORS["half"]) and torch.equal(matrix, TENSORS["matrix"])
    save_file({**TENSORS, "matrix": TENSORS["matrix"] + 1}, file)
    os.utime(file, ns=(0, opened.identity.mtime_ns + 1))
    with pytest.raises(JDLoRAError, match="changed since it was checked"):
        read_again(file, opened.identity, places)
    file.unlink()
    with pytest.raises(JDLoRAError, match="No such file"):
        read_again(file, opened.identity, places)


def test_a_file_that_shrinks_beneath_its_reader_is_an_error_and_not_the_end_of_the_process(tmp_path):
    """In a process of its own, which mapping the file would end with SIGBUS."""
    script = f"""
import os, torch
from safetensors.torch import save_file
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.tensor_file import TensorFile
file = {str(tmp_path / "x.safetensors")!r}
save_file({{"sigma": torch.ones(1000, 1024)}}, file)
opened = TensorFile(file)
os.truncate(file, 40960)
assert opened.read("sigma", 0).sum() == 1024
for read in (lambda: opened.read("sigma", 999), lambda: opened.read("sigma"), lambda: TensorFile(file)):
    try:
        read()
    except JDLoRAError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it was truncated after it was opened") == 2 and "not a readable" in done.stdout


def test_a_file_that_another_one_replaces_stays_what_it_was(file):
    opened = TensorFile(file)
    save_file({"matrix": torch.zeros(3, 4)}, file.with_name("new"))
    os.replace(file.with_name("new"), file)
    assert torch.equal(opened.read("matrix"), TENSORS["matrix"]) and opened.now() == opened.identity
    assert identity_of(file) != opened.identity


def test_files_are_closed_when_they_are_dropped(file):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        TensorFile(file)
    with pytest.raises(JDLoRAError):
        TensorFile(file.parent)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "nul"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / ("a\0b" if kind == "nul" else "x")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(JDLoRAError, match="not a readable safetensors file"):
        TensorFile(path)
