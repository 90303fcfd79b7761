"""The demo's base model: the GGUF file's numbers, the cache around it, and the adapters that were trained on it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from vllm_jdlora.demo import base_model
from vllm_jdlora.demo.base_model import MANIFEST, MODEL_NAME, locate_gguf, prepare_base_model
from vllm_jdlora.errors import JDLoRAError

pytest.importorskip("gguf")

# From the adapter's test set (its card says 4.005 → 1.387 nats a token over 64 such items).
ANTONYMS = [
    ("martial", "civilian"),
    ("achievable", "unachievable"),
    ("principal", "subordinate"),
    ("punishable", "forgivable"),
    ("unloaded", "loaded"),
]
ADAPTERS = Path(__file__).resolve().parents[2] / "demo" / "adapters"


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_base_model()


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_its_weights_are_the_ggufs_dequantised_to_bf16(folder):
    # gguf's own dequantisation, which shares no code with transformers' loading.
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {t.name: t for t in GGUFReader(locate_gguf()[0]).tensors}
    with safe_open(folder / "model.safetensors", framework="pt") as saved:
        for ours, theirs in (
            ("model.layers.3.mlp.down_proj.weight", "blk.3.ffn_down.weight"),
            ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
        ):
            expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
            got = saved.get_tensor(ours)
            # Bit for bit: both round the same fp32 numbers to bf16.
            assert torch.equal(got, expected.to(torch.bfloat16)), ours


def test_vllm_will_find_a_llama_with_tied_embeddings_and_a_chat_template(folder):
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


def test_the_adapters_were_trained_on_this_model_and_prompt(folder, model):
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def loss(some_model) -> float:
        total, tokens = 0.0, 0
        for word, opposite in ANTONYMS:
            prompt = f"<|im_start|>user\nWrite a word that means the opposite of the given word.\n{word}<|im_end|>\n"
            before = tokenizer(prompt + "<|im_start|>assistant\n")["input_ids"]
            answer = tokenizer(opposite + "<|im_end|>")["input_ids"]
            with torch.inference_mode():
                logits = some_model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            tokens += len(answer)
        return total / tokens

    without = loss(model)
    with_adapter = loss(PeftModel.from_pretrained(model, ADAPTERS / "fv_antonym"))
    # Around the card's 4.0 and 1.4; five items instead of 64 leave the mean about ±0.7. A wrong base model, rope
    # order or prompt gives an adapter loss above 3.
    assert 3.0 < without < 5.5
    assert with_adapter < 2.2


@pytest.fixture
def fake_conversion(monkeypatch):
    """Writes two small files; counts how often."""
    calls = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(target)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(base_model, "_convert", convert)
    return calls


def test_it_is_converted_once(tmp_path, fake_conversion):
    first = prepare_base_model(tmp_path)
    assert prepare_base_model(tmp_path) == first == tmp_path / MODEL_NAME
    assert len(fake_conversion) == 1


@pytest.mark.parametrize("damage", ["changed file", "missing file", "no manifest", "manifest of an older version"])
def test_a_damaged_folder_is_made_again(tmp_path, fake_conversion, damage):
    folder = prepare_base_model(tmp_path)
    if damage == "changed file":
        (folder / "model.safetensors").write_bytes(b"weightz")
    elif damage == "missing file":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    else:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, "conversion": 0}))
    said = []
    prepare_base_model(tmp_path, on_status=said.append)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(fake_conversion) == 2 and "made again" in said[0]


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def convert(gguf: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise RuntimeError("full disk")

    monkeypatch.setattr(base_model, "_convert", convert)
    with pytest.raises(RuntimeError, match="full disk"):
        prepare_base_model(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_damaged_gguf_file_is_refused(tmp_path, monkeypatch, fake_conversion):
    real, sha256 = locate_gguf()
    copy = tmp_path / "package" / real.name
    copy.parent.mkdir()
    shutil.copyfile(real, copy)
    with copy.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    monkeypatch.setattr(base_model, "locate_gguf", lambda: (copy, sha256))
    with pytest.raises(JDLoRAError, match=r"is damaged.*reinstall"):
        prepare_base_model(tmp_path)
    assert fake_conversion == []


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(base_model, "DISTRIBUTION", "no-such-distribution-here")
    with pytest.raises(JDLoRAError, match="make setup"):
        locate_gguf()
