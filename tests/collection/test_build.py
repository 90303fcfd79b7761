"""Compressing real adapters: stored errors against dense products, what stays plain, and PEFT's reading of exports."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import reference, tiny_llama
from vllm_jdlora.adapter import read_adapter, read_adapters
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.base_model import of_one_base_model
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.export import export_adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.paper_preset import paper_rule

DEMO = Path(__file__).parents[2] / "demo" / "adapters"


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The demo's eight adapters at rank 64 in one cluster."""
    adapters, _ = read_adapters([DEMO])
    assert len(adapters) == 8
    return compress(adapters, tmp_path_factory.mktemp("eight") / "collection", rank=64, clusters=1)


def dense_error(collection: Path, name: str) -> tuple[float, dict[str, float]]:
    """Relative error of an adapter over all slices and in each, from dense fp64 products of what lies on disk."""
    original = reference.plain_deltas(DEMO / name)
    served = reference.compressed_deltas(collection, name)
    squared = {s: (original[s] - served[s]).double().square().sum() for s in original}
    norms = {s: original[s].double().square().sum() for s in original}
    whole = (sum(squared.values()) / sum(norms.values())).sqrt().item()
    return whole, {s: (squared[s] / norms[s]).sqrt().item() for s in original}


def test_stored_errors_match_dense_products(eight):
    stored = eight.slice_errors()
    for row, entry in enumerate(eight.manifest.adapters):
        whole, by_slice = dense_error(eight.path, entry.name)
        # The bound; the dense reference rounds ΔW to fp32.
        assert abs(entry.relative_error - whole) < 1e-4
        for m, part in enumerate(eight.manifest.slices):
            assert abs(stored[row, m].item() - by_slice[part.name]) < 1e-4, (entry.name, part.name)
    assert 0.05 < max(a.relative_error for a in eight.manifest.adapters) < 0.2


def test_clusters_spend_the_same_bytes_with_less_error(eight, tmp_path):
    adapters, _ = read_adapters([DEMO])
    small = compress(adapters, tmp_path / "k4", rank=16, clusters=4)
    assert small.size_in_bytes() < eight.size_in_bytes()
    assert len({a.cluster for a in small.manifest.adapters}) == 4
    for entry in small.manifest.adapters:
        assert abs(dense_error(small.path, entry.name)[0] - entry.relative_error) < 1e-4


def test_the_same_seed_gives_the_same_files(tmp_path):
    adapters = [read_adapter(tiny_llama.write_adapter(tmp_path / f"a{i}", i)) for i in range(5)]
    one = compress(adapters, tmp_path / "one", rank=4, clusters=2, seed=3)
    two = compress(list(reversed(adapters)), tmp_path / "two", rank=4, clusters=2, seed=3)
    assert one.manifest.revision == two.manifest.revision
    assert one.manifest.revision != compress(adapters, tmp_path / "three", rank=5, clusters=2).manifest.revision


def test_adapters_above_the_error_limit_stay_plain(tmp_path):
    # Three of one family, one stranger: one cluster of the family's rank cannot hold the stranger.
    adapters = [read_adapter(tiny_llama.write_adapter(tmp_path / f"a{i}", 1), f"a{i}") for i in range(3)]
    adapters.append(read_adapter(tiny_llama.write_adapter(tmp_path / "stranger", 99)))
    collection = compress(adapters, tmp_path / "c", rank=4, clusters=1, max_error=0.5)
    assert [p.name for p in collection.manifest.plain] == ["stranger"]
    assert collection.manifest.plain[0].relative_error > 0.5
    assert read_adapter(collection.plain_path("stranger")).sha256 == adapters[-1].sha256
    assert all(a.relative_error <= 0.5 for a in collection.manifest.adapters)
    with pytest.raises(JDLoRAError, match=r"kept uncompressed: copy .*plain/stranger"):
        export_adapter(collection, "stranger", tmp_path / "export")
    with pytest.raises(JDLoRAError, match="every adapter has a relative error above"):
        compress(adapters, tmp_path / "none", rank=1, clusters=1, max_error=0.0)
    assert not (tmp_path / "none").exists()


def test_different_ranks_targets_and_missing_layers_fit_in_one_collection(tmp_path):
    adapters = [
        read_adapter(tiny_llama.write_adapter(tmp_path / "all", 1, rank=3)),
        read_adapter(tiny_llama.write_adapter(tmp_path / "attention", 2, rank=6, targets=["q_proj", "o_proj"])),
        read_adapter(tiny_llama.write_adapter(tmp_path / "mlp", 3, rank=1, targets=["down_proj"])),
    ]
    # Rank 10 holds all of them: no error, and nothing where an adapter has nothing.
    collection = compress(adapters, tmp_path / "c", rank=10, clusters=1, dtype="fp32")
    for adapter in adapters:
        served = reference.compressed_deltas(collection.path, adapter.name)
        original = reference.plain_deltas(adapter.path)
        for part in collection.manifest.slices:
            expected = original.get(part.name, torch.zeros(part.d_out, part.d_in))
            torch.testing.assert_close(served[part.name], expected, rtol=1e-4, atol=1e-5)  # fp32 storage
            if part.name not in original:
                assert not served[part.name].any()


@pytest.mark.parametrize("partial", [False, True])
def test_an_export_equals_the_compressed_adapter_in_peft(tmp_path, partial):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    targets = ["q_proj", "down_proj"] if partial else None
    adapters = [
        read_adapter(tiny_llama.write_adapter(tmp_path / "mine", 1, targets=targets)),
        read_adapter(tiny_llama.write_adapter(tmp_path / "other", 2)),
    ]
    collection = compress(adapters, tmp_path / "c", rank=5, clusters=1)
    export_adapter(collection, "mine", tmp_path / "export")
    model = LlamaForCausalLM.from_pretrained(tiny_llama.write_model(tmp_path / "model"), dtype=torch.float32).eval()
    tokens = torch.arange(1, 30)[None]
    with reference.merged(model, reference.compressed_deltas(collection.path, "mine")), torch.no_grad():
        expected = model(tokens).logits
    exported = PeftModel.from_pretrained(model, tmp_path / "export").eval()
    with torch.no_grad():
        # two layers in fp32, merged against added
        torch.testing.assert_close(exported(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert read_adapter(tmp_path / "export", "mine").rank == 5


def with_config(folder: Path, **changes) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_adapters_of_another_base_model_are_refused(tmp_path):
    folders = [tiny_llama.write_adapter(tmp_path / f"a{i}", i) for i in range(3)]
    with_config(folders[0], base_model_name_or_path="other/model")
    with_config(folders[1], base_model_name_or_path="some/where/Tiny-Llama")
    adapters = [read_adapter(f) for f in folders]
    with pytest.raises(JDLoRAError, match=r"a0/adapter_config.json: the adapter is for base model 'other/model'"):
        compress(adapters, tmp_path / "c", rank=2, clusters=1)
    with pytest.raises(JDLoRAError, match=r"a1/adapter_config.json: .* --base-model is 'hub/model'"):
        compress(adapters, tmp_path / "c", rank=2, clusters=1, base_model="hub/model")
    same, others, base = of_one_base_model(adapters, skip_others=True)
    assert [a.name for a in same] == ["a1", "a2"] and [name for name, _ in others] == ["a0"]
    assert base.name == "some/where/Tiny-Llama"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"hidden_size": 128}, "is 64 x 128, with .*config.json it would be 128 x 128"),
        ({"intermediate_size": 96}, r"mlp\.\w+_proj is "),
        ({"num_key_value_heads": 4}, r"[kv]_proj is 64 x 64, with .* it would be 128 x 64"),
        ({"num_hidden_layers": 1}, "beyond the 1 layers"),
        ({"model_type": "unheard-of", "hidden_size": 7}, None),
    ],
)
def test_the_base_models_own_config_decides_by_shape(tmp_path, change, told):
    model = tiny_llama.write_model(tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    adapters = [read_adapter(tiny_llama.write_adapter(tmp_path / "a0", 0))]
    if told is None:
        base = of_one_base_model(adapters, str(model))[2]
        assert base.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    else:
        with pytest.raises(JDLoRAError, match=told):
            of_one_base_model(adapters, str(model))


def test_scalings_that_overflow_the_storage_dtype_are_named(tmp_path):
    folder = with_config(tiny_llama.write_adapter(tmp_path / "a0", 0), lora_alpha=1e6)
    adapters = [read_adapter(folder), read_adapter(tiny_llama.write_adapter(tmp_path / "a1", 1))]
    with pytest.raises(JDLoRAError, match="a0: its scaling matrices do not fit into fp16"):
        compress(adapters, tmp_path / "c", rank=4, clusters=1, dtype="fp16")
    assert (
        max(a.relative_error for a in compress(adapters, tmp_path / "c", rank=8, clusters=1).manifest.adapters) < 0.02
    )


def test_more_clusters_than_adapters_are_refused_and_leave_nothing(tmp_path):
    adapters = [read_adapter(tiny_llama.write_adapter(tmp_path / "a0", 0))]
    with pytest.raises(JDLoRAError, match="cluster"):
        compress(adapters, tmp_path / "out" / "c", rank=2, clusters=3)
    assert not (tmp_path / "out").exists()


def test_the_papers_choice():
    assert [paper_rule(n) for n in (4, 8, 64, 100, 128, 200, 1024)] == [
        (16, 1),
        (16, 1),
        (40, 1),
        (64, 1),
        (16, 7),
        (16, 10),
        (16, 25),
    ]


def test_a_scaling_is_one_row_of_its_file(eight):
    sigma = Collection.open(eight.path).sigma(3)
    assert sigma.is_contiguous() and sigma.shape == (90, 64, 64) and sigma.dtype == torch.bfloat16
    assert torch.equal(sigma, load_file(eight.path / "scalings-00000.safetensors")["sigma"][3])
