"""`jdlora add`, `remove`, `diff`, `refresh`, `import-lora-xs` as a user meets them: output and exit codes."""

import json
import shutil

import pytest

from tests import tiny_llama, tiny_tokenizer
from tests.collection.families import write_member
from tests.collection.measured import moments_that_shun
from tests.collection.test_lora_xs import write_lora_xs
from vllm_jdlora.adapter import read_adapters
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    for i in range(3):
        write_member(root / "adapters" / f"a{i}", 0, i)
    write_member(root / "new" / "[red]new", 0, 9)
    write_member(root / "new" / "stranger", 5, 10)
    adapters = read_adapters([root / "adapters"])[0]
    compress(adapters, root / "c", rank=4, clusters=1)
    moments = moments_that_shun(root / "new" / "stranger")
    moments.save(root / "moments.safetensors")
    moments_that_shun(root / "new" / "stranger", text="1").save(root / "other.safetensors")
    compress(adapters, root / "outputs", rank=4, clusters=1, moments=moments)
    return root


@pytest.fixture
def here(untouched, tmp_path, monkeypatch):
    shutil.copytree(untouched, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def test_a_collection_is_added_to_compared_refreshed_and_thinned_out(here, capsys):
    shutil.copytree("c", "old")
    assert main(["diff", "old", "c"]) == 0
    assert main(["add", "c", "new", "--max-error", "0.4"]) == 0
    out = capsys.readouterr().out
    assert "[red]new: cluster 0, relative error 0." in out
    assert "plain: stranger: relative error " in out and "drift: relative error of new adapters" in out
    assert main(["validate", "c"]) == 0
    assert main(["diff", "old", "c"]) == 1
    out = capsys.readouterr().out
    assert "added: [red]new" in out and "added: stranger" in out and "bases: the same" in out
    assert main(["refresh", "c", "adapters", "new", "--dry-run"]) == 0
    assert "drift" in capsys.readouterr().out
    assert main(["refresh", "c", "adapters", "-o", "n", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["surrogates"] == ["[red]new"]
    assert main(["remove", "n", "a1"]) == 0
    out = capsys.readouterr().out
    assert "removed: a1" in out and "still carry traces" in out
    assert main(["diff", "c", "n", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["removed"] == ["a1"]
    assert main(["validate", "n"]) == 0


def test_the_reports_as_json(here, capsys):
    assert main(["add", "c", "new", "--grow", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rank"] == 6 and [e["name"] for e in facts["compressed"]] == ["[red]new", "stranger"]
    assert set(facts["drift"]) >= {"stored_error", "arrivals_error", "rebuild_pays"}
    assert main(["refresh", "c", "adapters", "new", "--dry-run", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["remove", "c", "stranger", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bases_carry_traces"] is True


def test_a_collection_in_the_activation_metric_is_added_to_and_refreshed_in_it(here, capsys):
    assert main(["add", "outputs", "new/[red]new", "--calibration", "moments.safetensors"]) == 0
    out, err = capsys.readouterr()
    assert "[red]new: cluster 0, relative error 0." in out and ", output error 0." in out and "note:" not in err
    assert "drift: output error of new adapters" in out
    assert main(["add", "outputs", "new/stranger"]) == 0
    out, err = capsys.readouterr()
    assert "note: " in err and "not known: give --calibration" in err and "output error" not in out
    assert [a.output_error is None for a in Collection.open("outputs").manifest.adapters] == [False] * 4 + [True]
    assert main(["refresh", "outputs", "adapters", "new", "-o", "n", "--calibration", "moments.safetensors"]) == 0
    assert "output error (mean): 0." in capsys.readouterr().out
    assert main(["validate", "n"]) == 0
    assert all(a.output_error is not None for a in Collection.open("n").manifest.adapters)
    assert main(["diff", "outputs", "n"]) == 1
    out = capsys.readouterr().out
    assert "output error: a0: 0." in out and "output error: stranger: not known → 0." in out
    assert main(["diff", "c", "n"]) == 1
    assert "output error" not in capsys.readouterr().out
    shared = ["--calibration", "moments.safetensors", "--json"]
    assert main(["refresh", "n", "adapters", "new", "-o", "again", *shared]) == 0
    assert set(json.loads(capsys.readouterr().out)["output_error"]) == {"mean_before", "mean_after"}
    assert main(["refresh", "n", "adapters", "new", "--dry-run", *shared]) == 0
    assert json.loads(capsys.readouterr().out) is None
    assert main(["remove", "n", "stranger"]) == 0
    capsys.readouterr()
    assert main(["add", "n", "new/stranger", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["compressed"][0]["output_error"] is None and "note: " in err


def test_moments_are_gathered_where_the_base_model_is_at_hand(tmp_path, capsys, monkeypatch):
    """The same text as for the compression: its moments are found again in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.write_tokenizer(tiny_llama.write_model(tmp_path / "tiny-llama"))
    for folder, seed in (("in/a0", 0), ("in/a1", 1), ("in/a2", 2), ("new/a3", 3)):
        tiny_llama.write_adapter(tmp_path / folder, seed, targets=["q_proj", "v_proj"])
    (tmp_path / "text.txt").write_text("some words\n\nand some more\n\nand a few other ones")
    known = ["--base-model", "tiny-llama", "--calibration", "text.txt"]
    size = ["--rank", "8", "--clusters", "1"]
    assert main(["compress", "in", "-o", "c", *size, "--metric", "activation", *known]) == 0
    (cached,) = (tmp_path / "cache").rglob("calibration/*.safetensors")
    assert main(["add", "c", "new", *known]) == 0
    assert "output error 0." in capsys.readouterr().out
    assert main(["refresh", "c", "in", "new", "-o", "n", *known]) == 0
    assert list((tmp_path / "cache").rglob("calibration/*.safetensors")) == [cached]
    assert main(["validate", "n"]) == 0
    tiny_llama.write_adapter(tmp_path / "other" / "k", 4, targets=["k_proj"])
    assert main(["add", "c", "other"]) == 0  # plain: there are no bases for it
    assert main(["refresh", "c", "in", "new", "-o", "wider", *known]) == 0
    assert {part.name.rpartition(".")[2] for part in Collection.open("wider").manifest.slices} == {
        "q_proj",
        "v_proj",
        "k_proj",
    }
    capsys.readouterr()
    assert main(["refresh", "c", "in", "new", "-o", "m", "--base-model", "tiny-llama"]) == 2
    assert "other calibration text" in capsys.readouterr().err


def test_lora_xs_is_imported(tmp_path, capsys):
    write_lora_xs(tmp_path / "x", tiny_llama.write_model(tmp_path / "tiny-llama"), 0)
    assert main(["import-lora-xs", str(tmp_path / "x"), "-o", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"]["max"] < 1e-7  # s·M rounded to fp32


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["add", "c", "adapters"], "--replace"),
        (["add", "c", "none"], "no such folder"),
        (["add", "none", "new"], "not a collection"),
        (["add", "c", "new", "--max-error", "2"], "between 0 and 1"),
        (["add", "c", "new", "--calibration", "moments.safetensors"], "leave out --calibration"),
        (["add", "outputs", "new", "--calibration", "other.safetensors"], "other calibration text"),
        (["add", "outputs", "new", "--calibration", "text.txt"], "give its folder as --base-model"),
        (["refresh", "outputs", "adapters", "-o", "n"], "give its second moments (--calibration)"),
        (["refresh", "outputs", "adapters", "--dry-run"], "give its second moments (--calibration)"),
        (["remove", "c", "nobody"], "no adapter named 'nobody'"),
        (["remove", "c", "a0", "a1", "a2"], "delete the folder instead"),
        (["refresh", "c", "adapters"], "give -o NEW"),
        (["refresh", "c", "adapters", "-o", "c"], "--force"),
        (["diff", "c", "adapters"], "not a collection"),
        (["import-lora-xs", "adapters", "-o", "x"], "jdlora compress"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(here, capsys, command, told):
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1 and told in lines[0]
