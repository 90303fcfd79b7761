"""What `compress` can be asked for: metric, method, bases in 8 bits, budgets. Errors against dense products."""

import pytest
import torch

from tests import reference, tiny_llama
from vllm_jdlora.adapter import read_adapter, read_adapters
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.quantize import dequantized, quantized
from vllm_jdlora.collection.schema import BaseModel
from vllm_jdlora.collection.second_moments import Origin, SecondMoments
from vllm_jdlora.errors import JDLoRAError


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for i in range(8):
        tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj", "v_proj"])
    return read_adapters([root])[0]


@pytest.fixture(scope="module")
def moments(adapters):
    """One second moment for each slice, with directions of very different energy."""
    draw = torch.Generator().manual_seed(3)
    matrices = {}
    for name, part in adapters[0].slices.items():
        x = torch.randn(300, part.shape.d_in, generator=draw) * torch.logspace(0, -1.5, part.shape.d_in)
        matrices[name] = x.T @ x / 300
    origin = Origin(BaseModel("tiny"), "0" * 64, texts=3, tokens=300, max_tokens=100, dtype="fp32")
    return SecondMoments(origin, {name: name for name in matrices}, matrices)


def dense(collection, adapter, moments=None):
    """Error of one adapter over all slices (in the metric of the moments), from dense products of what is stored."""
    original, stored = reference.plain_deltas(adapter.path), reference.compressed_deltas(collection.path, adapter.name)
    lost = energy = 0.0
    for name, delta in original.items():
        c = torch.eye(delta.shape[1]) if moments is None else moments.of(name)
        c = c.double() / c.double().diagonal().mean()
        c = c if moments is None else c + 1e-3 * torch.eye(len(c))  # the ridge of the metric
        error = (delta - stored[name]).double()
        lost += float((error @ c * error).sum())
        energy += float((delta.double() @ c * delta.double()).sum())
    return (lost / energy) ** 0.5


def test_the_activation_metric_lowers_output_errors_and_states_both(adapters, moments, tmp_path):
    plain = compress(adapters, tmp_path / "plain", rank=8, clusters=2)
    weighted = compress(adapters, tmp_path / "weighted", rank=8, clusters=2, moments=moments)
    for adapter, entry in zip(adapters, weighted.manifest.adapters, strict=True):
        assert entry.relative_error == pytest.approx(dense(weighted, adapter), rel=1e-4)  # ΔW in fp32 in the reference
        assert entry.output_error == pytest.approx(dense(weighted, adapter, moments), rel=1e-3)
    outputs = [sum(dense(c, a, moments) for a in adapters) for c in (weighted, plain)]
    assert outputs[0] < 0.95 * outputs[1]
    assert weighted.manifest.calibration.tokens == 300
    assert weighted.slice_output_errors().shape == weighted.slice_errors().shape
    assert Collection.open(weighted.path, verify=True).manifest.metric == "activation"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_bases_in_8_bits_take_half_the_bytes_and_their_errors_are_those_of_what_is_stored(adapters, tmp_path, kind):
    wide = compress(adapters, tmp_path / "wide", rank=8, clusters=2)
    small = compress(adapters, tmp_path / "small", rank=8, clusters=2, quantize=kind)
    for adapter, entry, other in zip(adapters, small.manifest.adapters, wide.manifest.adapters, strict=True):
        assert entry.relative_error == pytest.approx(dense(small, adapter), rel=1e-4)
        assert entry.relative_error < other.relative_error + {"int8": 0.01, "fp8": 0.05}[kind]
    bases = [c.path / "bases.safetensors" for c in (small, wide)]
    assert bases[0].stat().st_size < 0.7 * bases[1].stat().st_size  # tiny bases: headers and scales weigh
    assert Collection.open(small.path, verify=True).basis(small.manifest.slices[0].name)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantising_what_was_quantised_changes_nothing(kind):
    rows = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    rows[1, 2] = 0
    once = dequantized(*quantized(rows, kind))
    assert torch.equal(dequantized(*quantized(once, kind)), once)
    assert not once[1, 2].any()
    assert float((once - rows).abs().max()) < {"int8": 0.02, "fp8": 0.15}[kind]  # half a step of rows of size 3 to 4


def test_diagonal_scalings_are_stored_as_vectors_with_their_own_errors(adapters, tmp_path):
    diagonal = compress(adapters, tmp_path / "diag", rank=16, clusters=1, method="diag")
    assert diagonal.sigma(0).shape == (len(diagonal.manifest.slices), 16)
    assert torch.equal(diagonal.matrices(0)[0], torch.diag(diagonal.sigma(0)[0]))
    for adapter, entry in zip(adapters, diagonal.manifest.adapters, strict=True):
        assert entry.relative_error == pytest.approx(dense(diagonal, adapter), rel=1e-4)
    full = compress(adapters, tmp_path / "full", rank=16, clusters=1)
    assert sum(a.relative_error for a in full.manifest.adapters) < sum(
        a.relative_error for a in diagonal.manifest.adapters
    )


def test_a_byte_budget_is_kept_and_more_bytes_give_less_error(adapters, tmp_path):
    errors = []
    for share in (0.5, 0.75):
        made = compress(adapters, tmp_path / f"b{share}", max_bytes=lambda total, share=share: int(share * total))
        header = 8 * 1024  # safetensors headers are not counted
        assert made.size_in_bytes() <= share * 2 * sum(a.parameters for a in adapters) + header
        errors.append(sum(a.relative_error for a in made.manifest.adapters))
    assert errors[1] < errors[0]
    with pytest.raises(JDLoRAError, match="too few"):
        compress(adapters, tmp_path / "none", max_bytes=lambda total: 100)


def test_a_byte_budget_may_choose_the_method_and_the_choice_loses_less(adapters, tmp_path):
    def half(total):
        return total // 2

    made = {m: compress(adapters, tmp_path / m, max_bytes=half, method=m) for m in ("auto", "full", "diag")}
    lost = {m: sum(a.relative_error**2 for a in c.manifest.adapters) for m, c in made.items()}
    chosen = made["auto"].manifest
    assert chosen.method in ("full", "diag") and made["diag"].manifest.method == "diag"
    other = "full" if chosen.method == "diag" else "diag"
    assert lost["auto"] == lost[chosen.method] <= 1.05 * lost[other]  # a lower rank may lose 5 % more


def test_an_error_budget_is_kept_by_every_adapter_that_is_compressed(adapters, tmp_path):
    made = compress(adapters, tmp_path / "c", max_error=0.6)
    assert made.manifest.max_error == 0.6
    assert all(entry.relative_error <= 0.6 for entry in made.manifest.adapters)
    assert len(made.manifest.adapters) + len(made.manifest.plain) == 8
    total = made.size_in_bytes() + sum(2 * p.parameters for p in made.manifest.plain)
    assert total < 2 * sum(a.parameters for a in adapters)


def test_the_certificate_bounds_what_the_bases_reach(adapters, tmp_path):
    manifest = compress(adapters, tmp_path / "c", rank=6, clusters=2, dtype="fp32").manifest
    assert 0 < manifest.error_floor <= manifest.error_reached <= 2**0.5 * manifest.error_floor + 1e-6


def test_moments_of_another_model_are_refused(adapters, moments, tmp_path):
    few = SecondMoments(moments.origin, dict(list(moments.inputs.items())[:1]), moments.matrices)
    with pytest.raises(JDLoRAError, match="no second moment"):
        compress(adapters, tmp_path / "c", rank=4, clusters=1, moments=few)


def test_an_adapter_alone_in_its_cluster_stays_plain_where_bases_save_nothing(tmp_path):
    """Three of one family and one of another: with rank 4 in two clusters the odd one's bases would be itself."""
    family = [tiny_llama.write_adapter(tmp_path / f"a{i}", 0, targets=["q_proj"]) for i in range(3)]
    odd = tiny_llama.write_adapter(tmp_path / "odd", 5, targets=["q_proj"])
    made = compress([read_adapter(f) for f in (*family, odd)], tmp_path / "c", rank=4, clusters=2)
    assert [p.name for p in made.manifest.plain] == ["odd"]
    assert "alone in its cluster" in made.manifest.plain[0].reason
    assert made.manifest.clusters == 1
    assert {entry.cluster for entry in made.manifest.adapters} == {0}
    assert Collection.open(made.path, verify=True).basis(made.manifest.slices[0].name)[0].shape[0] == 1
    for adapter, entry in zip([read_adapter(f) for f in family], made.manifest.adapters, strict=True):
        assert entry.relative_error == pytest.approx(dense(made, adapter), abs=1e-3)
    half = compress([read_adapter(f) for f in (*family, odd)], tmp_path / "half", rank=2, clusters=2)
    assert half.manifest.plain == ()  # rank 2 takes half the adapter's bytes
