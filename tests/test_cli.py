"""The `jdlora` command as a user meets it: output, exit codes, one line for each error."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from tests import tiny_llama
from vllm_jdlora.cli import main
from vllm_jdlora.collection.schema import MANIFEST_FILE


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """Four adapters, and the collection that `jdlora compress` makes of them."""
    root = tmp_path_factory.mktemp("cli")
    for i in range(4):
        tiny_llama.write_adapter(root / "adapters" / f"a{i}", i, targets=["q_proj", "v_proj"])
    command = ["compress", str(root / "adapters"), "-o", str(root / "c"), "--rank", "6", "--clusters", "2"]
    assert main(command) == 0
    return root


@pytest.fixture
def adapters(untouched, tmp_path):
    return shutil.copytree(untouched / "adapters", tmp_path / "adapters")


@pytest.fixture
def collection(untouched, tmp_path):
    return shutil.copytree(untouched / "c", tmp_path / "c")


def one_error_line(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1
    return lines[0]


def test_compress_inspect_validate_and_export(collection, tmp_path, capsys):
    assert main(["inspect", str(collection), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [a["name"] for a in facts["adapters"]] == ["a0", "a1", "a2", "a3"]
    assert facts["compression_ratio"] > 0 and set(facts["relative_error"]) == {"mean", "max"}
    assert main(["inspect", str(collection)]) == 0
    assert "relative error" in capsys.readouterr().out
    assert main(["validate", str(collection), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["valid"] is True
    assert main(["export", str(collection), "a2", "-o", str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "adapter_config.json").is_file()


def test_validate_finds_damage_with_exit_code_1(collection, capsys):
    file = collection / "bases.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert main(["validate", str(collection)]) == 1
    assert "bases.safetensors" in one_error_line(capsys)
    assert main(["validate", str(collection), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["valid"] is False


def test_one_bad_adapter_stops_the_run_or_is_skipped_and_listed(adapters, tmp_path, capsys):
    (adapters / "a1" / "adapter_model.safetensors").write_bytes(b"no")
    command = ["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4", "--clusters", "1"]
    assert main(command) == 2
    assert "a1/adapter_model.safetensors" in one_error_line(capsys)
    assert not (tmp_path / "c").exists()
    assert main([*command, "--skip-bad"]) == 0
    assert "skipped: a1" in capsys.readouterr().out
    listed = json.loads((tmp_path / "c" / MANIFEST_FILE).read_text())["skipped"]
    assert [s["name"] for s in listed] == ["a1"]


def test_an_adapter_of_another_base_model_is_skipped_too(adapters, tmp_path, capsys):
    file = adapters / "a3" / "adapter_config.json"
    file.write_text(file.read_text().replace("tiny-llama", "other"))
    command = ["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4"]
    assert main(command) == 2
    assert "a3/adapter_config.json" in one_error_line(capsys)
    assert main([*command, "--skip-bad"]) == 0
    assert "skipped: a3" in capsys.readouterr().out


def test_names_and_reasons_are_never_obeyed_by_the_terminal(adapters, tmp_path, capsys):
    (adapters / "a0").rename(adapters / "[red]")
    (adapters / "a1").rename(adapters / "[b")
    (adapters / "a2").rename(adapters / "\x1b[2J\n")
    assert main(["compress", str(adapters), "-o", str(tmp_path / "[bold]c"), "--rank", "4", "--skip-bad"]) == 0
    out = capsys.readouterr().out
    assert "[bold]c" in out and "[red] " in out and "[b " in out
    assert "\x1b[2J" not in out and r"skipped: \x1b[2J\n" in out


def test_without_rank_and_clusters_the_papers_rule_holds(adapters, tmp_path, capsys):
    assert main(["compress", str(adapters), "-o", str(tmp_path / "c"), "--clusters", "auto", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["rank"], facts["clusters"]) == (16, 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compress", "{tmp}/none", "-o", "{tmp}/x"], "no such folder"),
        (["compress", "{adapters}", "-o", "{collection}"], "--force"),
        (["compress", "{adapters}", "-o", "{tmp}/x", "--clusters", "9"], "9"),
        (["compress", "{adapters}", "-o", "{tmp}/x", "--max-error", "3"], "between 0 and 1"),
        (["inspect", "{tmp}"], "not a collection"),
        (["export", "{collection}", "nobody", "-o", "{tmp}/x"], "no compressed adapter named 'nobody'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(adapters, collection, tmp_path, capsys, arguments, told):
    filled = [a.format(tmp=tmp_path, adapters=adapters, collection=collection) for a in arguments]
    assert main(filled) == 2
    assert told in one_error_line(capsys)


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["compress"], ["compress", "x", "-o", "y", "--rank", "0"], ["explode"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_help_needs_neither_torch_nor_vllm():
    code = (
        "import sys; from vllm_jdlora.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    start = time.monotonic()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    assert time.monotonic() - start < 5  # a second on a quiet machine


def test_the_core_works_without_vllm(adapters, tmp_path):
    code = "import sys; sys.modules['vllm'] = None\nfrom vllm_jdlora.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = ["compress", str(adapters), "-o", str(tmp_path / "c"), "--rank", "4"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
