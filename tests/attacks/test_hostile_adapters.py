"""Adapter folders made to harm: each is read as what it says, or refused with one line; nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests import tiny_llama
from vllm_jdlora.adapter import WEIGHTS_FILE, read_adapter, read_adapters
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE, PeftConfig


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny_llama.write_adapter(tmp_path_factory.mktemp("good") / "good", 1, targets=["q_proj"])


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "mine")


class Trap:
    """What unpickling executes."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", WEIGHTS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("beside_good_weights", [True, False])
def test_a_pickle_is_never_loaded_whatever_it_is_called(folder, tmp_path, capsys, name, beside_good_weights):
    mark = tmp_path / "executed"
    trap = pickle.dumps(Trap(mark))
    if not beside_good_weights:
        (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(trap)
    code = main(["compress", str(folder), "-o", str(tmp_path / "c"), "--rank", "2", "--clusters", "1"])
    assert code == (0 if beside_good_weights and name.endswith((".bin", ".pt")) else 2)
    assert not mark.exists() and "Traceback" not in capsys.readouterr().err
    pickle.loads(trap)
    assert mark.exists()  # it would have been seen


# --- configs ----------------------------------------------------------------------------------------------------------

ODD = [None, True, 0, -1, 1.5, 1e400, float("nan"), 10**400, "", "x", [], [[]], {}, {"a": {}}, "\ud800", [1, "a", None]]
FIELDS = ["r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save"]
FIELDS += ["init_lora_weights", "base_model_name_or_path", "use_dora", "peft_type", "layer_replication"]


def with_config(folder: Path, **values) -> Path:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_another_type_is_refused_or_means_nothing(folder, field):
    text = (folder / CONFIG_FILE).read_text()
    for value in ODD:
        (folder / CONFIG_FILE).write_text(text)
        with_config(folder, **{field: value})
        try:
            adapter = read_adapter(folder)
        except JDLoRAError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000
        else:
            assert adapter.rank == 4 and all(b.isfinite().all() for b, _ in map(adapter.factors, adapter.slices))


BOMBS = {
    "a deep nest": "[" * 1_000_000,
    "a deep nest in a field": '{"r": 4, "lora_alpha": 8, "target_modules": [], "bias": ' + "[" * 900 + "]" * 900 + "}",
    "a long number": '{"r": ' + "9" * 5_000 + "}",
    "a number that ends": '{"r": ' + "9" * 4_000 + ', "lora_alpha": 1, "target_modules": [], "use_rslora": true}',
    "one field twice": '{"r": 4, "r": 5, "lora_alpha": 8, "target_modules": []}',
    "much": '{"r": 4, "x": "' + "x" * (17 << 20) + '"}',
    "names": '{"r": ' + json.dumps({str(i): i for i in range(100_000)}) + ', "lora_alpha": 1, "target_modules": 1}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_config_that_is_too_much_is_refused_in_a_line(folder, bomb):
    (folder / CONFIG_FILE).write_text(BOMBS[bomb])
    started = time.monotonic()
    with pytest.raises(JDLoRAError, match=CONFIG_FILE) as error:
        read_adapter(folder)
    assert len(str(error.value)) < 1000 and time.monotonic() - started < 5


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(folder, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(JDLoRAError, match=name):
        read_adapter(folder)


SLOW = ["([a-z_.0-9]+)+!", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*!", "(a?){30}a{30}", "a?" * 30, r"(.*)\1*!", "(?=(a+))a*b"]
SLOW += ["(q|q)" * 12, "x)*(y|x)*(z", "(?:a+)+b", "(?i)a", "(?P<n>a)(?P=n)+", "a{1,1000}{1,1000}"]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_may_take_for_ever_is_refused(folder, pattern):
    """One match of a regular expression holds the interpreter, and with it every request of a server."""
    started = time.monotonic()
    with pytest.raises(JDLoRAError, match=r"may take for ever|not a regular expression"):
        read_adapter(with_config(folder, rank_pattern={pattern: 4}))
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        r"layers\.0\..*q_proj",
        r"^model\.layers\.\d+\.self_attn\.q_proj",
        r".*\.layers\.(0|1|2|3)\.self_attn\.(q|v)_proj",
        r"layers\.[0-3]\.self_attn\.(?:q|k|v|o)_proj",
        "|".join(f"layers.{i}.q_proj" for i in range(64)),
    ],
)
def test_patterns_as_people_write_them_are_taken(folder, pattern):
    config = PeftConfig.read(with_config(folder, alpha_pattern={pattern: 16}) / CONFIG_FILE)
    assert config.rank_and_scale("model.layers.0.mlp.down_proj") == (4, 2.0)
    if "q_proj" in pattern or "q|" in pattern:
        assert config.rank_and_scale("model.layers.0.self_attn.q_proj")[1] in (2.0, 4.0)


def test_patterns_that_are_allowed_end_soon_on_the_longest_names(folder):
    slowest = [r".*a.*", r"(a|a|a|a|a|a)(a|a|a)", r"[^b]*c*", "a?.*"]
    config = PeftConfig.read(with_config(folder, rank_pattern=dict.fromkeys(slowest, 4)) / CONFIG_FILE)
    started = time.monotonic()
    config.rank_and_scale("a." * 127 + "a")
    assert time.monotonic() - started < 5


# --- names ------------------------------------------------------------------------------------------------------------


def test_folders_whose_names_look_alike_are_different_adapters(tmp_path):
    """Composed and decomposed, Latin and Cyrillic, narrow and wide: none takes another's place."""
    names = ["caf\u00e9", "cafe\u0301", "paypal", "p\u0430ypal", "A", "\uff21", "\ufb01x", "fix", "．．", "a／b"]
    assert len({unicodedata.normalize("NFKC", name) for name in names}) < len(names)
    for i, name in enumerate(names):
        tiny_llama.write_adapter(tmp_path / "in" / name, i, targets=["q_proj"])
    target = tmp_path / "c"
    assert main(["compress", str(tmp_path / "in"), "-o", str(target), "--rank", "4", "--clusters", "1"]) == 0
    found = Collection.open(target).manifest.adapters
    assert [a.name for a in found] == sorted(names)
    assert len({a.sha256 for a in found}) == len(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "in"]


@pytest.mark.parametrize("name", ["\udcff\udcfe", "a\u202eb", "a\u200bb", "a\nb", "\x1b]0;x\x07", "x" * 250, "-rf"])
def test_a_folder_with_an_odd_name_is_refused_in_a_printable_line_or_taken_as_it_is(good, tmp_path, capsys, name):
    shutil.copytree(good, tmp_path / "in" / name)
    code = main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "c"), "--rank", "2", "--clusters", "1"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert code == (0 if name == "-rf" else 2)
    assert code == 0 or (told.startswith("jdlora: adapter name") and told.isprintable())


@pytest.mark.parametrize("output", ["x" * 300, "x" * 5_000, "file/c", "a\x1b[2J" + "y" * 300])
def test_an_output_that_cannot_be_is_told_in_a_line(good, tmp_path, capsys, output):
    (tmp_path / "file").touch()
    code = main(["compress", str(good), "-o", str(tmp_path / output), "--rank", "2", "--clusters", "1"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and told.startswith("jdlora: ") and told.isprintable()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- fuzzing ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
PATTERNS = st.text(alphabet="aq_.*+?()[]|^$\\d{}0,-", max_size=12)


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    st.sampled_from(["rank_pattern", "alpha_pattern"]),
)
def test_any_config_is_read_or_refused(good, tmp_path, values, patterns, field):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(good, folder)
    config = json.loads((good / CONFIG_FILE).read_text()) | {field: patterns} | values
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    try:
        adapter = read_adapter(folder)
    except JDLoRAError as error:
        assert str(folder) in str(error)
        return
    assert adapter.rank == 4 and adapter.base_model in (None, config["base_model_name_or_path"])


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "200")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=200) | st.text(max_size=50).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_config_are_read_or_refused(good, tmp_path, data):
    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(good, folder)
    (folder / CONFIG_FILE).write_bytes(data)
    with pytest.raises(JDLoRAError, match=CONFIG_FILE):
        read_adapter(folder)
    adapters, skipped = read_adapters([folder, good], skip_bad=True)
    assert [a.name for a in adapters] == ["good"] and [name for name, _ in skipped] == ["fuzzed"]


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.dictionaries(st.text(alphabet="abq_.lorABweight0 \n", max_size=40), st.integers(0, 3), max_size=3), st.data())
def test_any_names_of_tensors_are_read_or_refused(good, tmp_path, names, data):
    import torch

    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(good, folder)
    tensors = {}
    for name, dimensions in names.items():
        shape = [data.draw(st.sampled_from([0, 1, 4])) for _ in range(dimensions)]
        suffix = data.draw(st.sampled_from(["", ".lora_A.weight", ".lora_B.weight", ".lora_embedding_A"]))
        tensors[name + suffix] = torch.ones(shape)
    (folder / WEIGHTS_FILE).write_bytes(save(tensors))
    try:
        adapter = read_adapter(folder)
    except JDLoRAError as error:
        assert str(folder) in str(error)
        return
    assert adapter.slices and all(name.isprintable() for name in adapter.slices)
