"""Edits of collections of every kind: diagonal scalings, bases in 8 bits, errors of outputs."""

import pytest
import torch

from tests import reference, tiny_llama
from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add, remove
from vllm_jdlora.collection.refresh import refresh
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.second_moments import Origin, SecondMoments
from vllm_jdlora.errors import JDLoRAError


@pytest.fixture
def adapters(tmp_path):
    for i in range(4):
        tiny_llama.write_adapter(tmp_path / "adapters" / f"a{i}", i, targets=["q_proj", "v_proj"])
    return read_adapters([tmp_path / "adapters"])[0]


def moments_of(adapters):
    names = adapters[0].slices
    matrices = {name: torch.diag(torch.linspace(0.1, 2, part.shape.d_in)) for name, part in names.items()}
    origin = Origin(BaseModel("tiny"), "0" * 64, texts=1, tokens=9, max_tokens=9, dtype="fp32")
    return SecondMoments(origin, {name: name for name in names}, matrices)


def dense_error(path, adapter):
    original, stored = reference.plain_deltas(adapter.path), reference.compressed_deltas(path, adapter.name)
    lost, energy = (
        sum(float(d.double().square().sum()) for d in deltas)
        for deltas in ([original[n] - stored[n] for n in original], original.values())
    )
    return (lost / energy) ** 0.5


@pytest.mark.parametrize("options", [{"method": "diag"}, {"quantize": "int8"}, {"activation": True}], ids=str)
def test_adapters_come_and_go(adapters, tmp_path, options):
    options = dict(options)
    moments = moments_of(adapters) if options.pop("activation", False) else None
    path = compress(adapters[:3], tmp_path / "c", rank=8, clusters=1, moments=moments, **options).path
    before = Collection.open(path).slice_output_errors()
    added = add(path, [adapters[3]])
    assert [entry.name for entry in added.compressed] == ["a3"]
    after = Collection.open(path, verify=True)
    assert after.manifest.adapters[3].relative_error == pytest.approx(dense_error(path, adapters[3]), rel=1e-4)
    if moments is not None:
        errors = after.slice_output_errors()
        assert torch.equal(errors[:3], before)
        assert errors[3].isnan().all()  # its calibration is not at hand
    remove(path, ["a0"])
    left = Collection.open(path, verify=True)
    assert [entry.name for entry in left.manifest.adapters] == ["a1", "a2", "a3"]
    for adapter, entry in zip(adapters[1:], left.manifest.adapters, strict=True):
        assert entry.relative_error == pytest.approx(dense_error(path, adapter), rel=1e-4)


def test_bases_in_8_bits_neither_grow_nor_are_refreshed(adapters, tmp_path):
    path = compress(adapters[:3], tmp_path / "c", rank=8, clusters=1, quantize="int8").path
    revision = Collection.open(path).manifest.revision
    with pytest.raises(JDLoRAError, match="do not grow"):
        add(path, [adapters[3]], grow=4)
    with pytest.raises(JDLoRAError, match="not refreshed"):
        refresh(path, adapters, tmp_path / "new")
    assert Collection.open(path, verify=True).manifest.revision == revision
