"""Calibration: second moments against hidden states of Hugging Face, texts, and files that came to harm."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import reference, tiny_llama, tiny_tokenizer
from vllm_jdlora import calibration
from vllm_jdlora.adapter import SliceShape, file_digest, read_adapter
from vllm_jdlora.calibration import SecondMoments, adapter_moments, calibration_texts, gather, gather_cached, slices_of
from vllm_jdlora.calibration_text import read_texts, text_sha256
from vllm_jdlora.cli import main
from vllm_jdlora.errors import JDLoRAError

TEXTS = ["The quick brown fox.", "a", "jumps over", "<|im_start|>user\nwhy?<|im_end|>"]
ATTENTION = ["q_proj", "k_proj", "v_proj"]
# Sums of some 50 products in fp32 against fp64 ones: a few ulp of the largest entries.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tiny_llama.write_model(tmp_path_factory.mktemp("model") / "tiny-llama")
    return tiny_tokenizer.write_tokenizer(folder)


@pytest.fixture(scope="module")
def moments(model_folder):
    return gather(model_folder, TEXTS, slices_of(model_folder, ATTENTION))


@pytest.fixture
def saved(moments, tmp_path):
    moments.save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@torch.no_grad()
def dense_attention_moments(folder, texts, deltas=None):
    """Layer → E[xxᵀ] of the normed hidden state, fp64, from HF's `hidden_states` without the first token."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = {layer: [] for layer in range(tiny_llama.LAYERS)}
    with reference.merged(model, deltas or {}):
        for text in texts:
            hidden = model(tokenizer(text, return_tensors="pt").input_ids, output_hidden_states=True).hidden_states
            for layer in rows:
                rows[layer].append(model.model.layers[layer].input_layernorm(hidden[layer])[0, 1:])
    stacked = {layer: torch.cat(x).double() for layer, x in rows.items()}
    return {layer: x.T @ x / len(x) for layer, x in stacked.items()}, len(stacked[0])


def test_moments_are_those_of_the_hidden_states(model_folder, moments):
    expected, tokens = dense_attention_moments(model_folder, TEXTS)
    assert moments.origin.tokens == tokens
    for layer, c in expected.items():
        for target in ATTENTION:
            got = moments.of(f"model.layers.{layer}.self_attn.{target}")
            torch.testing.assert_close(got.double(), c, **CLOSE)
            assert torch.equal(got, got.T)


def test_slices_that_read_the_same_input_share_one_matrix(model_folder):
    targets = [t.rpartition(".")[2] for t in tiny_llama.TARGETS]
    moments = gather(model_folder, TEXTS, slices_of(model_folder, targets))
    assert len(moments.inputs) == 7 * tiny_llama.LAYERS and len(moments.matrices) == 4 * tiny_llama.LAYERS
    layer = "model.layers.1."
    assert moments.of(layer + "mlp.gate_proj") is moments.of(layer + "mlp.up_proj")
    assert moments.of(layer + "self_attn.q_proj") is not moments.of(layer + "mlp.up_proj")
    assert moments.of(layer + "mlp.down_proj").shape == (tiny_llama.MLP, tiny_llama.MLP)


def test_an_adapters_moments_are_those_of_the_merged_model(model_folder, tmp_path):
    folders = [tiny_llama.write_adapter(tmp_path / f"a{i}", i) for i in range(2)]
    pairs = [(read_adapter(folder), TEXTS[i:]) for i, folder in enumerate(folders)]
    base, _ = dense_attention_moments(model_folder, TEXTS)
    for i, (adapter, moments) in enumerate(adapter_moments(model_folder, pairs)):
        assert moments.origin.adapter_sha256 == adapter.sha256
        expected, _ = dense_attention_moments(model_folder, TEXTS[i:], reference.plain_deltas(folders[i]))
        got = moments.of("model.layers.1.self_attn.q_proj").double()
        # Weights that are merged and weights that are not differ by rounding in every layer before.
        torch.testing.assert_close(got, expected[1], rtol=1e-3, atol=1e-4)
        assert (got - base[1]).abs().max() > 1e-2  # the adapter does change them


def test_text_model_and_settings_are_recorded(model_folder, saved):
    origin = SecondMoments.load(saved).origin
    assert origin.text_sha256 == text_sha256(TEXTS) != text_sha256(TEXTS[1:])
    assert origin.base_model.name == "tiny-llama"
    assert origin.base_model.fingerprint == file_digest(model_folder / "config.json")
    assert (origin.texts, origin.max_tokens, origin.dtype) == (4, 512, "fp32")


def test_long_texts_are_cut(model_folder):
    moments = gather(model_folder, ["x" * 100], slices_of(model_folder, ["q_proj"]), max_tokens_per_text=11)
    assert moments.origin.tokens == 10


def test_a_saved_file_gives_the_same_matrices(moments, saved):
    loaded = SecondMoments.load(saved)
    assert loaded.origin == moments.origin and loaded.inputs == moments.inputs
    for name in moments.inputs:
        assert torch.equal(loaded.of(name), moments.of(name))
    assert [f.name for f in saved.parent.iterdir()] == [saved.name]
    loaded.check_fit([SliceShape("model.layers.0.self_attn.q_proj", 128, 64)], moments.origin.base_model.fingerprint)


def test_moments_that_do_not_fit_are_refused(moments):
    with pytest.raises(JDLoRAError, match=r"no second moment for model\.layers\.0\.mlp\.up_proj"):
        moments.of("model.layers.0.mlp.up_proj")
    with pytest.raises(JDLoRAError, match="64 inputs, its adapters 32"):
        moments.check_fit([SliceShape("model.layers.0.self_attn.q_proj", 128, 32)])
    with pytest.raises(JDLoRAError, match="another base model"):
        moments.check_fit([], "0" * 64)


def damaged(file, *, tensors=None, header=None):
    """The file with some tensors replaced, or with its header changed."""
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    if header:
        metadata = {"second_moments": json.dumps(header(json.loads(metadata["second_moments"])))}
    save_file(load_file(file) | (tensors or {}), file, metadata=metadata)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda c: c.index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
        (lambda c: c[:, :5].contiguous(), "not square"),
        (lambda c: c.half(), "float16"),
        (lambda c: c + torch.eye(64).roll(1, 0) * c.diagonal().mean(), "not symmetric"),
        (lambda c: c - 0.05 * c.diagonal().min() * torch.ones(64, 64), "negative directions"),
        (lambda c: -c, "negative or all zero"),
        (lambda c: 0 * c, "negative or all zero"),
    ],
)
def test_damaged_matrices_are_refused(saved, spoil, told):
    key = "model.layers.0.self_attn.q_proj"
    damaged(saved, tensors={key: spoil(load_file(saved)[key])})
    with pytest.raises(JDLoRAError, match=f"m.safetensors: damaged: {key}.*{told}"):
        SecondMoments.load(saved)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (lambda h: None, "holds no second moments"),
        (lambda h: h | {"format_version": 9}, "format version 9, this program reads 2"),
        (lambda h: h | {"inputs": {}}, "list of slices"),
        (lambda h: h | {"inputs": {"a": "b"}}, "do not belong together"),
        (lambda h: h | {"origin": 3}, "where it comes from"),
        (lambda h: h | {"origin": h["origin"] | {"tokens": 0}}, "count of texts and tokens"),
        (lambda h: h | {"origin": h["origin"] | {"text_sha256": "x"}}, "digest of the text"),
    ],
)
def test_damaged_headers_are_refused(saved, header, told):
    damaged(saved, header=header)
    with pytest.raises(JDLoRAError, match=told):
        SecondMoments.load(saved)


def test_files_that_are_no_moments_are_refused(saved):
    saved.write_bytes(saved.read_bytes()[:200])
    with pytest.raises(JDLoRAError, match="not a readable safetensors file"):
        SecondMoments.load(saved)


def test_a_file_that_cannot_be_written_is_told(moments, saved):
    with pytest.raises(JDLoRAError, match="cannot be written"):
        moments.save(saved / "below-a-file")


def test_the_cache_is_used_for_the_same_text_and_model_only(model_folder, tmp_path, monkeypatch):
    slices = slices_of(model_folder, ["q_proj"])
    first = gather_cached(model_folder, TEXTS, slices, cache_dir=tmp_path)
    (file,) = (tmp_path / "calibration").iterdir()
    ran = []
    monkeypatch.setattr(calibration, "gather", lambda *a, **k: ran.append(1) or gather(*a, **k))
    again = gather_cached(model_folder, TEXTS, slices, cache_dir=tmp_path)
    assert not ran and torch.equal(again.of(slices[0].name), first.of(slices[0].name))
    file.write_bytes(b"damaged")
    gather_cached(model_folder, TEXTS, slices, cache_dir=tmp_path)
    assert len(ran) == 1
    gather_cached(model_folder, TEXTS[:2], slices, cache_dir=tmp_path)
    gather_cached(model_folder, TEXTS, slices[:1], cache_dir=tmp_path)
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("slices", "told"),
    [
        ([SliceShape("model.layers.7.self_attn.q_proj", 1, 64)], "no module model.layers.7"),
        ([SliceShape("model.layers.0.self_attn.q_proj", 1, 32)], "64 inputs, the adapters 32"),
        ([SliceShape("lm_head", 256, 64)], "took no part"),
    ],
)
def test_modules_that_the_model_lacks_are_refused(model_folder, slices, told):
    with pytest.raises(JDLoRAError, match=told):
        gather(model_folder, TEXTS, slices)


def test_bad_models_targets_and_texts_are_refused(model_folder, tmp_path):
    with pytest.raises(JDLoRAError, match="not a model's folder"):
        gather(tmp_path, TEXTS, [])
    with pytest.raises(JDLoRAError, match=r"no module named w_q; it has .*q_proj"):
        slices_of(model_folder, ["w_q"])
    with pytest.raises(JDLoRAError, match="no text of two tokens"):
        gather(model_folder, ["a"], slices_of(model_folder, ["q_proj"]))


def test_the_texts_that_ship_are_many_and_different(model_folder):
    texts = read_texts(chat=True)
    assert len(set(texts)) == len(texts) == 221
    assert texts == calibration_texts(model_folder)
    assert all(t.startswith("<|im_start|>user\n") and t.endswith("<|im_end|>") for t in texts)
    assert not any("<|im" in t for t in read_texts(chat=False))


def test_a_tokenizer_without_chat_markup_gets_plain_text(tmp_path):
    folder = tiny_tokenizer.write_tokenizer(tmp_path, chat=False)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert calibration_texts(folder) == read_texts(chat=False)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("lines.txt", "one\ntwo\n\n", ["one", "two"]),
        ("paragraphs.txt", "one\nmore\n\n \ntwo\n", ["one\nmore", "two"]),
        ("text.jsonl", '{"text": "a\\nb"}\n\n{"text": "c"}\n', ["a\nb", "c"]),
        (
            "tasks.jsonl",
            '{"instruction": "Say", "input": "x", "output": "y"}\n{"instruction": "Sing"}',
            [
                "<|im_start|>user\nSay\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>",
                "<|im_start|>user\nSing<|im_end|>\n<|im_start|>assistant\n<|im_end|>",
            ],
        ),
    ],
)
def test_text_files_of_all_kinds(tmp_path, name, content, texts):
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name, chat=True) == texts


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text"', "x.jsonl, line 2: not readable as JSON"),
        ("x.jsonl", b'{"txt": "a"}', 'line 1: must be an object with "text"'),
        ("x.jsonl", b'{"instruction": "a", "input": 3}', "line 1"),
        ("x.txt", b" \n\n", "holds no text"),
        ("x.txt", b"\xff\xfe", "cannot be read as text"),
        ("x.csv", b"a", ".txt or a .jsonl"),
    ],
)
def test_bad_text_files_are_refused(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JDLoRAError, match=told):
        read_texts(tmp_path / name, chat=True)


def test_the_command_writes_a_file_that_loads(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("hello\nworld\n")
    tiny_llama.write_adapter(tmp_path / "adapters" / "a", 0, targets=["q_proj", "up_proj"])
    command = ["calibrate", "--base-model", str(model_folder), "--calibration", str(tmp_path / "text.txt")]
    assert main([*command, "-o", str(tmp_path / "m.safetensors"), "--adapters", str(tmp_path / "adapters")]) == 0
    out = capsys.readouterr().out
    moments = SecondMoments.load(tmp_path / "m.safetensors")
    assert len(moments.inputs) == 4 and moments.origin.text_sha256 == text_sha256(["hello", "world"])
    assert (
        "4 second moments for 4 modules, from 8 tokens of 2 texts" in out
        and text_sha256(["hello", "world"])[:12] in out
    )
    assert main(["calibrate", "--base-model", str(tmp_path), "-o", str(tmp_path / "x")]) == 2
    assert "not a model's folder" in capsys.readouterr().err


class _WithOffset(torch.nn.Module):
    """A linear module whose output gets an explicit tensor added, to differentiate by."""

    def __init__(self, linear, offset):
        super().__init__()
        self.linear, self.offset = linear, offset

    def forward(self, x):
        return self.linear(x) + self.offset


def dense_gradient_moments(folder, texts, names):
    """Slice → E[ggᵀ] fp64 by autograd of one text's loss by an offset of the module's output."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    rows = {name: [] for name in names}
    linear = {name: model.get_submodule(name) for name in names}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] < 2:
            continue
        offsets = {}
        for name in names:
            offsets[name] = torch.zeros(1, ids.shape[1], linear[name].out_features, requires_grad=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _WithOffset(linear[name], offsets[name]))
        logits = model(ids).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        loss = -logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, list(offsets.values())), strict=True):
            rows[name].append(gradient[0, 1:])
    stacked = {name: torch.cat(parts).double() for name, parts in rows.items()}
    return {name: g.T @ g / len(g) for name, g in stacked.items()}


def test_gradient_moments_are_those_of_autograd(model_folder, moments):
    slices = slices_of(model_folder, ATTENTION)
    found = gather(model_folder, TEXTS, slices, gradients=True)
    expected = dense_gradient_moments(model_folder, TEXTS, [part.name for part in slices])
    for part in slices:
        g, reference_g = found.gradients_of(part.name).double(), expected[part.name]
        # fp32 gradients through three layers, against the largest entry.
        assert (g - reference_g).abs().max() < 1e-4 * reference_g.abs().max()
    for name in moments.inputs:
        assert torch.allclose(found.of(name), moments.of(name), **CLOSE)
    assert (found.metric, moments.metric, found.of_inputs().metric) == ("fisher", "activation", "activation")


def test_gradient_moments_survive_a_file(model_folder, tmp_path):
    slices = slices_of(model_folder, ATTENTION)
    found = gather(model_folder, TEXTS, slices, gradients=True)
    found.save(tmp_path / "g.safetensors")
    loaded = SecondMoments.load(tmp_path / "g.safetensors")
    assert loaded.metric == "fisher" and loaded.gradients == found.gradients
    assert all(torch.equal(loaded.gradients_of(part.name), found.gradients_of(part.name)) for part in slices)
    without = loaded.of_inputs()
    without.save(tmp_path / "c.safetensors")
    assert SecondMoments.load(tmp_path / "c.safetensors").gradients_of(slices[0].name) is None


def test_sums_beyond_the_memory_take_further_passes_to_the_same_bits(model_folder, tmp_path, monkeypatch):
    slices = slices_of(model_folder, ATTENTION)
    at_once = gather(model_folder, TEXTS, slices, gradients=True)
    stages = []
    monkeypatch.setattr(calibration, "_SUMS_BYTES", 3 * 8 * slices[0].d_in ** 2)
    apart = gather(model_folder, TEXTS, slices, gradients=True, progress=lambda *event: stages.append(event))
    passes = {total for _, _, total in stages}
    assert len(passes) == 1 and passes.pop() > 2 * len(TEXTS)
    assert list(apart.matrices) == list(at_once.matrices)
    assert all(torch.equal(apart.matrices[key], at_once.matrices[key]) for key in at_once.matrices)
    apart.save(tmp_path / "m.safetensors")
    assert SecondMoments.load(tmp_path / "m.safetensors").matrices.keys() == at_once.matrices.keys()
