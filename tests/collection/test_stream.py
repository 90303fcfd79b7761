"""The streaming writer: what the safetensors library reads back, however the tensors were cut."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_jdlora.collection.stream import write_streamed


def test_files_are_read_back_by_safetensors(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "ü.V": torch.randn(3, 4, 5, generator=draw).bfloat16(),
        "a": torch.randn(2, 7, generator=draw),
        "odd": torch.arange(3, dtype=torch.int8),
        "after": torch.randn(6, 2, generator=draw).double(),
    }
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    pieces = [piece for value in tensors.values() for piece in value.split(2)]
    pieces[0] = tensors["ü.V"][:2].transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
    digest = write_streamed(tmp_path / "x.safetensors", layout, iter(pieces))
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())


def test_values_that_do_not_fill_the_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 bytes were given for tensors of 12"):
        write_streamed(tmp_path / "x.safetensors", {"a": (torch.float32, (3,))}, [torch.zeros(2)])
