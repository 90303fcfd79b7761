"""Adapters in: the same ones as vLLM accepts, ΔW as PEFT computes it, and a clear line for everything else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny_llama
from vllm_jdlora.adapter import WEIGHTS_FILE, read_adapter, read_adapters
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return tiny_llama.write_adapter(tmp_path / "mine", 1, targets=["q_proj", "v_proj"])


def change_config(folder, **values):
    config = json.loads((folder / CONFIG_FILE).read_text())
    config |= values
    (folder / CONFIG_FILE).write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


# --- what ΔW is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6}},
        {"alpha_pattern": {"v_proj": 3, r"layers\.0\..*q_proj": 20}},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 7}, "use_rslora": True},
        {"layers_to_transform": [1]},
    ],
)
def test_factors_multiply_to_what_peft_adds(tmp_path, options):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama.write_model(tmp_path / "model"))
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    peft_model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    layers = {n.removeprefix("base_model.model."): m for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    layers = {n: m for n, m in layers.items() if len(m.lora_A)}
    assert set(adapter.slices) == set(layers)
    for name, layer in layers.items():
        b, a = adapter.factors(name)
        # fp32 products of up to six terms in another order
        torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-5)
    assert adapter.factors("model.layers.0.self_attn.k_proj") is None


def test_the_digest_follows_the_content_and_not_the_place(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert read_adapter(copy).sha256 == read_adapter(folder).sha256
    change_config(copy, lora_alpha=9)
    assert read_adapter(copy).sha256 != read_adapter(folder).sha256


# --- the same answers as vLLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": []},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 1]]},
        {"use_qalora": True},
        {"r": 0},
        {"r": "REMOVE"},
        {"lora_alpha": "REMOVE"},
        {"target_modules": "REMOVE"},
        {"rank_pattern": {"k_proj": 0}},
    ],
    ids=json.dumps,
)
def test_configs_are_accepted_and_refused_as_vllm_does(folder, change):
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    change_config(folder, **change)
    try:
        PEFTHelper.from_local_dir(str(folder), None).validate_legal(LoRAConfig(max_lora_rank=64))
        vllm_accepts = True
    except (ValueError, TypeError):
        vllm_accepts = False
    try:
        read_adapter(folder)
        accepted = True
    except JDLoRAError as error:
        assert str(folder / CONFIG_FILE) in str(error)
        accepted = False
    assert accepted == vllm_accepts


# --- what is wrong with it --------------------------------------------------------------------------------------------


def drop(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop(f"{Q0}.lora_B.weight"), r"q_proj: lora_B is missing"),
        (drop(f"{Q0}.lora_A.weight"), r"q_proj: lora_A is missing"),
        (put(f"{Q0}.lora_A.weight", torch.full((4, 64), torch.nan)), r"lora_A.*NaN or infinity"),
        (put(f"{Q0}.lora_B.weight", torch.full((128, 4), torch.inf)), r"lora_B.*NaN or infinity"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4, 64, dtype=torch.int8)), r"lora_A.*dtype I8"),
        (put(f"{Q0}.lora_A.weight", torch.ones(4)), r"lora_A.*shape \[4\]"),
        (put(f"{Q0}.lora_A.weight", torch.ones(3, 64)), r"A is \[3, 64\].*\[128, 4\].*rank 4"),
        (put("something.else", torch.ones(2, 2)), r"'something.else' is not the name of a LoRA weight"),
        (dict.clear, r"no LoRA weights"),
    ],
)
def test_wrong_weights_are_told_with_file_and_tensor(folder, change, told):
    change_weights(folder, change)
    with pytest.raises(JDLoRAError, match=told) as error:
        read_adapter(folder)
    assert str(folder / WEIGHTS_FILE) in str(error.value)


def test_pickled_weights_are_not_read(folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(JDLoRAError, match="convert adapter_model"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 4}', "\x00"])
def test_a_config_that_is_none_is_told(folder, text):
    (folder / CONFIG_FILE).write_text(text)
    with pytest.raises(JDLoRAError, match=CONFIG_FILE):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["", "a/b", "..", "../up", ".hidden", "a\nb", "a\x00", " a", "x" * 201, "a\\b"])
def test_a_name_that_could_be_a_path_is_refused(folder, name):
    with pytest.raises(JDLoRAError, match="adapter name"):
        read_adapter(folder, name)


@pytest.mark.parametrize("name", ["modèle-émotion", "task 12", "a.b_c-d+e@f", "感情"])
def test_names_are_any_text(folder, name):
    assert read_adapter(folder, name).name == name


def test_head_and_embedding_adapters_are_read_and_kept_from_compression(folder):
    change_weights(folder, put("base_model.model.lm_head.lora_A.weight", torch.ones(4, 64)))
    change_weights(folder, put("base_model.model.lm_head.lora_B.weight", torch.ones(256, 4)))
    assert "lm_head" in read_adapter(folder).plain_only


# --- collections of folders -------------------------------------------------------------------------------------------


def test_a_bad_adapter_stops_the_reading_or_is_left_out_and_named(tmp_path):
    for i in range(3):
        tiny_llama.write_adapter(tmp_path / f"a{i}", i)
    (tmp_path / "a1" / CONFIG_FILE).write_text("{")
    with pytest.raises(JDLoRAError, match="a1"):
        read_adapters([tmp_path])
    adapters, skipped = read_adapters([tmp_path], skip_bad=True)
    assert [a.name for a in adapters] == ["a0", "a2"]
    assert [name for name, _ in skipped] == ["a1"] and CONFIG_FILE in skipped[0][1]


def test_two_adapters_of_one_name_are_refused(tmp_path):
    one = tiny_llama.write_adapter(tmp_path / "x" / "same", 1)
    two = tiny_llama.write_adapter(tmp_path / "y" / "same", 2)
    with pytest.raises(JDLoRAError, match="second adapter named 'same'"):
        read_adapters([one, two])


def test_a_folder_without_adapters_is_told(tmp_path):
    with pytest.raises(JDLoRAError, match="neither a PEFT adapter nor a folder of them"):
        read_adapters([tmp_path])
    with pytest.raises(JDLoRAError, match="no such folder"):
        read_adapters([tmp_path / "none"])


def test_a_linked_folder_keeps_the_name_of_the_link(tmp_path):
    # Download caches keep content under digests and link readable names to it.
    folder = tiny_llama.write_adapter(tmp_path / "cache" / "0123abcd", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "antonyms").symlink_to(folder)
    adapters, _ = read_adapters([tmp_path / "mine"])
    assert [a.name for a in adapters] == ["antonyms"]
    assert read_adapter(folder / ".").name == "0123abcd"
