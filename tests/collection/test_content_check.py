"""Numbers that are not finite are told by their bits, and damage is found wherever in a file it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_jdlora.collection import content_check
from vllm_jdlora.collection.content_check import all_finite
from vllm_jdlora.collection.stream import write_streamed
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.tensor_file import TensorFile


def floats(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(bits).view(dtype).float()


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("BF16", torch.bfloat16, np.arange(1 << 16, dtype=np.uint16).view(np.int16)),
        ("F16", torch.float16, np.arange(1 << 16, dtype=np.uint16).view(np.int16)),
        ("F8_E4M3", torch.float8_e4m3fn, np.arange(1 << 8, dtype=np.uint8)),
        # Every sign and exponent, with the smallest and the largest fractions.
        (
            "F32",
            torch.float32,
            np.add.outer(np.arange(1 << 9, dtype=np.uint32) << 23, np.array([0, 1, (1 << 23) - 1], dtype=np.uint32))
            .reshape(-1)
            .view(np.int32),
        ),
    ],
)
def test_every_number_alone_and_among_others(name, dtype, bits):
    expected = torch.isfinite(floats(bits, dtype)).tolist()
    assert {True, False} == set(expected)
    # Among the smallest and the largest finite numbers of both signs.
    values = floats(bits, dtype)
    finite = bits[torch.isfinite(values).numpy()]
    around = finite[[int(v) for v in (values[expected].argmin(), values[expected].argmax())]]
    for number, good in zip(bits, expected, strict=True):
        for row in ([number], [around[0], number, around[1]]):
            assert all_finite(memoryview(np.array(row, bits.dtype)).cast("B"), name) is good, hex(number)


def test_whole_numbers_are_finite():
    assert all_finite(memoryview(bytes(range(256))), "I8")


class Manifest:
    """What is read of one."""

    plain = ()

    def __init__(self, **files):
        self.files = {f"{name}.safetensors": digest for name, digest in files.items()}


def check_content(folder, manifest):
    files = {name: TensorFile(folder / name) for name in manifest.files}
    content_check.check_content(folder, manifest, files)


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Two files of two tensors each, written and checked in pieces of 64 bytes; returns a function that writes one."""
    monkeypatch.setattr(content_check, "_PIECE_BYTES", 64)

    def write(name, place=None):
        tensors = {"first": torch.ones(3, 7, dtype=torch.bfloat16), "last": torch.full((5, 11), 3.0)}
        if place is not None:
            tensors[place[0]].view(-1)[place[1]] = torch.nan
        layout = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        return write_streamed(tmp_path / f"{name}.safetensors", layout, tensors.values())

    return write


def test_good_files_pass(tmp_path, shards):
    check_content(tmp_path, Manifest(one=shards("one"), two=shards("two")))


@pytest.mark.parametrize("place", [("first", 0), ("first", 20), ("last", 0), ("last", 16), ("last", 54)])
def test_a_number_that_is_not_finite_is_found_in_every_piece_and_named(tmp_path, shards, place):
    with pytest.raises(JDLoRAError, match=rf"two\.safetensors: {place[0]} holds NaN"):
        check_content(tmp_path, Manifest(one=shards("one"), two=shards("two", place)))


def test_errors_may_be_nan(tmp_path, shards):
    check_content(tmp_path, Manifest(errors=shards("errors", ("last", 3))))


@pytest.mark.parametrize("where", [3, 30, -1, -100, -240])
def test_a_flipped_bit_is_found_everywhere_and_said_before_anything_else(tmp_path, shards, where):
    files = Manifest(one=shards("one"), two=shards("two", ("last", 54)))
    data = bytearray((tmp_path / "two.safetensors").read_bytes())
    data[where] ^= 1
    (tmp_path / "two.safetensors").write_bytes(data)
    with pytest.raises(JDLoRAError, match=r"two\.safetensors: (was changed|not a readable)"):
        check_content(tmp_path, files)


def test_of_several_bad_files_the_first_is_named(tmp_path, shards):
    files = Manifest(one=shards("one", ("first", 0)), two="0" * 64)
    shards("two")
    with pytest.raises(JDLoRAError, match=r"one\.safetensors: first holds"):
        check_content(tmp_path, files)
