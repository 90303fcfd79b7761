"""Safetensors files that lie: what is accepted safetensors reads the same, and all else is refused by name."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tests import tiny_llama
from vllm_jdlora.adapter import WEIGHTS_FILE, read_adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.tensor_file import TensorFile

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


def laid_out(header: object, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "empty": b"",
    "no header": struct.pack("<Q", 0),
    "a header longer than the file": laid_out({}, length=1 << 20),
    "a header of 2^63 bytes": laid_out({}, length=1 << 63),
    "no JSON": laid_out(b"{" * 64),
    "no object": laid_out([1]),
    "blanks before it": laid_out(b' {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}'),
    "no UTF-8": laid_out(b'{"\xff": 1}'),
    "a deep nest": laid_out(b"{" + b'"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "half a surrogate pair": laid_out({"\ud800": entry([16], 0, 64)}),
    "one name twice": laid_out(b'{"a":' + json.dumps(entry([16], 0, 64)).encode() + b',"a":{"dtype":"F32"}}'),
    "overlapping tensors": laid_out({"a": entry([16], 0, 64), "b": entry([8], 32, 64)}),
    "the same bytes twice": laid_out({"a": entry([16], 0, 64), "b": entry([16], 0, 64)}),
    "a gap": laid_out({"a": entry([4], 0, 16), "b": entry([4], 48, 64)}),
    "a gap before the first": laid_out({"a": entry([12], 16, 64)}),
    "bytes behind the last": laid_out({"a": entry([8], 0, 32)}),
    "beyond the end": laid_out({"a": entry([32], 0, 128)}),
    "backwards": laid_out({"a": entry([16], 64, 0)}),
    "before the start": laid_out({"a": entry([16], -64, 0)}),
    "a shape that does not fill its bytes": laid_out({"a": entry([15], 0, 64)}),
    "a huge shape": laid_out({"a": entry([1 << 62, 1 << 62], 0, 64)}),
    "a huge shape of nothing": laid_out({"a": entry([0, 1 << 62, 1 << 62], 0, 0), "b": entry([16], 0, 64)}),
    "a shape that overflows to the right size": laid_out({"a": entry([(1 << 62) + 4, 4], 0, 64)}),
    "a number of 5,000 digits": laid_out(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,64]}}'),
    "a negative size": laid_out({"a": entry([-16], 0, 64)}),
    "a size with a point": laid_out({"a": entry([16.0], 0, 64)}),
    "a size that is true": laid_out({"a": entry([True], 0, 4), "b": entry([15], 4, 64)}),
    "a size that is text": laid_out({"a": entry(["16"], 0, 64)}),
    "no list of sizes": laid_out({"a": entry(16, 0, 64)}),
    "one offset": laid_out({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64]}}),
    "no dtype": laid_out({"a": {"shape": [16], "data_offsets": [0, 64]}}),
    "a dtype that is none": laid_out({"a": entry([16], 0, 64, "F33")}),
    "a dtype that is a number": laid_out({"a": entry([16], 0, 64, 32)}),
    "half a byte": laid_out({"a": entry([1], 0, 1, "F4"), "b": entry([63], 1, 64, "U8")}),
    "a description that is a list": laid_out({"a": [1, 2]}),
    "metadata that is a number": laid_out({"__metadata__": {"x": 1}, "a": entry([16], 0, 64)}),
    "metadata that is a list": laid_out({"__metadata__": [], "a": entry([16], 0, 64)}),
}


def same_for_safetensors(file: Path) -> None:
    """What `TensorFile` accepts, safetensors reads, and the same."""
    opened = TensorFile(file)
    with safe_open(file, framework="pt") as expected:
        assert set(expected.keys()) == set(opened.tensors)
        assert (expected.metadata() or {}) == opened.metadata
        for name, place in opened.tensors.items():
            part = expected.get_slice(name)
            assert part.get_shape() == list(place.shape) and part.get_dtype() == place.dtype
            if place.dtype in ("F32", "F16", "BF16", "I8", "F8_E4M3"):
                found, tensor = opened.read(name), expected.get_tensor(name)
                assert found.dtype == tensor.dtype
                assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_wherever_it_lies(tmp_path, lie):
    folder = tiny_llama.write_adapter(tmp_path / "a", 0, targets=["q_proj"])
    (folder / WEIGHTS_FILE).write_bytes(LIES[lie])
    with pytest.raises(JDLoRAError, match=f"{WEIGHTS_FILE}: not a readable safetensors file"):
        read_adapter(folder)


def test_a_header_beyond_all_measure_is_not_parsed(tmp_path):
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", 90 << 20) + b"{")
        out.truncate(8 + (90 << 20))
    with pytest.raises(JDLoRAError, match="its header is said to take 94371840 bytes"):
        TensorFile(file)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (([4, 1 << 29], [128, 4]), "no matrix of a LoRA is as large"),
        (([4, 1 << 34], [128, 4]), "no adapter is as large"),
    ],
)
def test_a_file_of_holes_is_refused_before_anything_of_it_is_held(tmp_path, shapes, told):
    """A terabyte of zeros costs its writer nothing."""
    folder = tiny_llama.write_adapter(tmp_path / "a", 0, targets=["q_proj"])
    header, end = {}, 0
    for name, shape in zip((A, B), shapes, strict=True):
        size = 4 * shape[0] * shape[1]
        header[name] = entry(shape, end, end + size)
        end += size
    text = json.dumps(header).encode()
    with open(folder / WEIGHTS_FILE, "wb") as out:
        out.write(laid_out(text, b""))
        out.truncate(8 + len(text) + end)
    with pytest.raises(JDLoRAError, match=told):
        read_adapter(folder)


def test_names_of_a_megabyte_are_refused_and_cut_in_the_message(tmp_path):
    folder = tiny_llama.write_adapter(tmp_path / "a", 0, targets=["q_proj"])
    long = "base_model.model." + "x" * (1 << 20)
    header = {f"{long}.lora_A.weight": entry([4, 2], 0, 32), f"{long}.lora_B.weight": entry([2, 4], 32, 64)}
    (folder / WEIGHTS_FILE).write_bytes(laid_out(header))
    with pytest.raises(JDLoRAError, match="no model has such a module") as error:
        read_adapter(folder)
    assert len(str(error.value)) < 1000


# --- fuzzing ----------------------------------------------------------------------------------------------------------

SEED = save(
    {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.ones(8, dtype=torch.int8)},
    metadata={"format": "pt"},
)
WORDS = [b'"dtype"', b'"shape"', b'"data_offsets"', b'"F32"', b'"BF16"', b"[", b"]", b"{", b"}", b",", b":", b"0"]
WORDS += [b"-1", b"1e3", b"18446744073709551616", b"true", b"null", b'"__metadata__"', b"\\ud800", b"NaN", b" ", b"\0"]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A small valid file with a few bytes or words changed, taken out or put in, and perhaps its length put right."""
    data = bytearray(SEED)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        piece = draw(st.sampled_from(WORDS) | st.binary(min_size=1, max_size=3))
        kind = draw(st.sampled_from(["write", "put in", "take out", "cut", "swap"]))
        if kind == "write":
            data[at : at + len(piece)] = piece
        elif kind == "put in":
            data[at:at] = piece
        elif kind == "take out":
            del data[at : at + len(piece)]
        elif kind == "cut":
            del data[at:]
        else:
            old, new = draw(st.sampled_from(WORDS)), draw(st.sampled_from(WORDS))
            data = bytearray(bytes(data).replace(old, new, 1))
        data = data or bytearray(b"\0")
    if draw(st.booleans()):
        end = bytes(data).rfind(b"}", 8)
        if end > 0:
            data[:8] = struct.pack("<Q", end + 1 - 8)
    return bytes(data)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Files of the right form whose numbers, names and dtypes are drawn."""
    number = st.integers(0, 8) | st.sampled_from([-1, 16, 24, 32, 1 << 31, 1 << 63, 1 << 64, 10**30, 1.0, True, None])
    dtype = st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "BOOL", "U64", "F4", "C64", "", "f32", 3])
    one = st.fixed_dictionaries(
        {"dtype": dtype, "shape": st.lists(number, max_size=3), "data_offsets": st.lists(number, max_size=3)}
    )
    names = st.text(max_size=3) | st.sampled_from(["a", "b", "__metadata__"])
    header = draw(st.dictionaries(names, one | st.dictionaries(st.text(max_size=2), st.text(max_size=2)), max_size=3))
    return laid_out(header, draw(st.binary(max_size=32)))


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "300")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(damaged() | headers())
@example(SEED)
@example(laid_out({"a": entry([], 0, 4)}, b"\0" * 4))
@example(laid_out({}, b""))
def test_whatever_is_accepted_safetensors_reads_the_same(tmp_path, data):
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    try:
        TensorFile(file)
    except JDLoRAError as error:
        assert str(error).startswith(str(file))
        return
    try:
        same_for_safetensors(file)
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what was accepted: {error}: {data!r}") from error
