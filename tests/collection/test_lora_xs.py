"""LoRA-XS folders as the authors' training scripts save them, against dense products B·M·A."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference, tiny_llama
from tests.collection.families import write_member
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.edit import add
from vllm_jdlora.collection.export import export_adapter
from vllm_jdlora.collection.lora_xs import import_lora_xs
from vllm_jdlora.errors import JDLoRAError

RANK = 6
KEYS = {
    "peft before 0.14": "{module}_lora_latent_mapping.weight",
    "peft since 0.14": "{module}.default_lora_latent_mapping.weight",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama.write_model(tmp_path_factory.mktemp("model") / "tiny-llama")


def write_lora_xs(
    folder, model, seed, *, key=KEYS["peft since 0.14"], with_bases=True, targets=("q_proj", "down_proj")
):
    """What `model.save_pretrained` leaves: A = (P S)ᵀ and B = Qᵀ of the SVD Wᵀ = P S Q, and the trained M."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, w in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        left, singular, right = torch.linalg.svd(w.T, full_matrices=False)
        prefix = f"base_model.model.{module}"
        if with_bases:
            tensors[f"{prefix}.lora_A.weight"] = (left @ torch.diag(singular))[:, :RANK].T.contiguous()
            tensors[f"{prefix}.lora_B.weight"] = right[:RANK].T.contiguous()
        tensors[f"base_model.model.{key.format(module=module)}"] = 0.1 * torch.randn(RANK, RANK, generator=draw)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/tiny-llama",
        "r": RANK,
        "lora_alpha": 3 * RANK,
        "target_modules": sorted(targets),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def deltas(folder, with_bases=None):
    """ΔW = s·B·M·A in fp64; A and B from `with_bases`' file where this one has none."""
    tensors = load_file((with_bases or folder) / "adapter_model.safetensors")
    own = load_file(folder / "adapter_model.safetensors")
    latents = {
        k.replace(".default_lora_latent", "_lora_latent").removesuffix("_lora_latent_mapping.weight"): v
        for k, v in own.items()
        if "latent" in k
    }
    return {
        prefix.removeprefix("base_model.model."): 3.0
        * tensors[f"{prefix}.lora_B.weight"].double()
        @ m.double()
        @ tensors[f"{prefix}.lora_A.weight"].double()
        for prefix, m in latents.items()
    }


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS.keys())
def test_an_import_in_fp32_loses_nothing(model, tmp_path, key):
    folders = [write_lora_xs(tmp_path / "in" / f"x{i}", model, i, key=key) for i in range(3)]
    collection = import_lora_xs([tmp_path / "in"], tmp_path / "c")
    manifest = Collection.open(collection.path, verify=True).manifest
    assert (manifest.rank, manifest.clusters, manifest.dtype) == (RANK, 1, "fp32")
    assert manifest.base_model.name == "org/tiny-llama"
    for folder, entry in zip(folders, manifest.adapters, strict=True):
        # s·M is rounded to fp32 once, nothing else is.
        assert entry.name == folder.name and entry.relative_error < 1e-7
        served, original = reference.compressed_deltas(collection.path, entry.name), deltas(folder)
        assert set(served) == set(original)
        for name, w in original.items():
            torch.testing.assert_close(served[name], w.float(), rtol=1e-6, atol=1e-6)


def test_scales_that_are_powers_of_two_leave_error_zero(model, tmp_path):
    folder = write_lora_xs(tmp_path / "x", model, 0)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 2 * RANK}))
    assert import_lora_xs([folder], tmp_path / "c").manifest.adapters[0].relative_error == 0.0


def test_in_bf16_the_casts_error_is_recorded(model, tmp_path):
    folders = [write_lora_xs(tmp_path / "in" / f"x{i}", model, i) for i in range(2)]
    collection = import_lora_xs(folders, tmp_path / "c", dtype="bf16")
    for folder, entry in zip(folders, collection.manifest.adapters, strict=True):
        served, original = reference.compressed_deltas(collection.path, entry.name), deltas(folder)
        lost = sum(float((w - served[s].double()).square().sum()) for s, w in original.items())
        exact = (lost / sum(float(w.square().sum()) for w in original.values())) ** 0.5
        assert 1e-4 < exact < 1e-2  # bf16 keeps 8 bits
        assert entry.relative_error == pytest.approx(exact, rel=1e-3)


def test_an_import_is_served_and_exported_like_any_collection(model, tmp_path):
    folder = write_lora_xs(tmp_path / "x", model, 0)
    collection = import_lora_xs([folder], tmp_path / "c")
    export_adapter(collection, "x", tmp_path / "export")
    exported = reference.plain_deltas(tmp_path / "export")
    for name, w in deltas(folder).items():
        torch.testing.assert_close(exported[name], w.float(), rtol=1e-5, atol=1e-5)


def test_ordinary_adapters_are_added_to_bases_that_are_not_orthonormal(model, tmp_path):
    collection = import_lora_xs([write_lora_xs(tmp_path / "x", model, 0)], tmp_path / "c")
    export_adapter(collection, "x", tmp_path / "same")
    file = tmp_path / "same" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny-llama"}))
    # Its own LoRA form lies in the bases: added, it is lossless.
    assert add(tmp_path / "c", [read_adapter(tmp_path / "same")]).compressed[0].relative_error < 1e-5


def test_missing_bases_come_from_the_base_weights(model, tmp_path):
    bare = write_lora_xs(tmp_path / "in" / "bare", model, 0, with_bases=False)
    full = write_lora_xs(tmp_path / "in" / "full", model, 1)
    with pytest.raises(JDLoRAError, match=r"bare.*A and B are not in the file; give --base-model FOLDER"):
        import_lora_xs([bare], tmp_path / "c")
    collection = import_lora_xs([tmp_path / "in"], tmp_path / "c", base_model=str(model))
    assert collection.manifest.base_model.fingerprint is not None
    served = reference.compressed_deltas(collection.path, "bare")
    for name, w in deltas(bare, with_bases=full).items():
        # The same call on the same machine: the same signs.
        torch.testing.assert_close(served[name], w.float(), rtol=1e-4, atol=1e-5)


def changed(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors, part):
    return next(k for k in sorted(tensors) if part in k)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update({first(t, "lora_B"): -t[first(t, "lora_B")]}), "lora_B is not that of the other adapters"),
        (lambda t: t.pop(first(t, "lora_A")), "only lora_B is there"),
        (lambda t: t.pop(first(t, "latent")), "A and B without lora_latent_mapping"),
        (lambda t: t.update({first(t, "latent"): torch.full((RANK, RANK), float("nan"))}), "NaN or infinity"),
        (lambda t: t.update({first(t, "latent"): torch.zeros(RANK, RANK - 1)}), f"says rank {RANK}"),
        (lambda t: t.update({"base_model.model.classifier.weight": torch.ones(2, 2)}), "a trained head"),
        (lambda t: t.update({"something.else": torch.ones(2, 2)}), "not a weight of LoRA-XS"),
    ],
    ids=["other B", "half a pair", "no M", "NaN", "shape", "head", "unknown"],
)
def test_what_is_wrong_is_named_and_nothing_written(model, tmp_path, change, told):
    folders = [write_lora_xs(tmp_path / "in" / f"x{i}", model, i) for i in range(2)]
    changed(folders[1], change)
    with pytest.raises(JDLoRAError, match=f"x1/adapter_model.safetensors.*{told}"):
        import_lora_xs(folders, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_ordinary_lora_is_sent_to_compress(tmp_path):
    with pytest.raises(JDLoRAError, match="compress ordinary LoRAs with jdlora compress"):
        import_lora_xs([write_member(tmp_path / "lora", 0, 0)], tmp_path / "c")


def test_rounding_between_machines_is_measured_not_refused(model, tmp_path):
    folders = [write_lora_xs(tmp_path / "in" / f"x{i}", model, i) for i in range(2)]
    changed(folders[1], lambda t: t.update({first(t, "lora_A"): t[first(t, "lora_A")] * (1 + 2e-7)}))
    collection = import_lora_xs(folders, tmp_path / "c")
    assert 0 < collection.manifest.adapters[1].relative_error < 1e-6
    served, original = reference.compressed_deltas(collection.path, "x1"), deltas(folders[1])
    assert all(torch.allclose(served[s], w.float(), rtol=1e-5, atol=1e-5) for s, w in original.items())


def test_different_targets_share_one_collection(model, tmp_path):
    write_lora_xs(tmp_path / "in" / "q", model, 0, targets=("q_proj",))
    both = write_lora_xs(tmp_path / "in" / "qd", model, 1)
    collection = import_lora_xs([tmp_path / "in"], tmp_path / "c")
    served = reference.compressed_deltas(collection.path, "q")
    assert not served["model.layers.0.mlp.down_proj"].any() and served["model.layers.0.self_attn.q_proj"].any()
    assert set(deltas(both)) == {part.name for part in collection.manifest.slices}


def test_the_authors_form_of_the_forward_pass(model, tmp_path):
    """x Aᵀ Mᵀ Bᵀ · s, layer by layer, against the served matrices."""
    folder = write_lora_xs(tmp_path / "x", model, 4)
    collection = import_lora_xs([folder], tmp_path / "c")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    x = torch.randn(5, tiny_llama.HIDDEN, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.functional.linear
    y = linear(x, tensors[f"{key}.lora_A.weight"])
    y = linear(linear(y, tensors[f"{key}.default_lora_latent_mapping.weight"]), tensors[f"{key}.lora_B.weight"]) * 3
    served = reference.compressed_deltas(collection.path, "x")["model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(x @ served.T, y, rtol=1e-4, atol=1e-5)  # three fp32 products


def test_the_command_prints_the_collection(model, tmp_path, capsys):
    write_lora_xs(tmp_path / "x", model, 0)
    assert main(["import-lora-xs", str(tmp_path / "x"), "-o", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"]["max"] < 1e-7
