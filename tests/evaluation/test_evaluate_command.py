"""`jdlora evaluate` as a user meets it."""

from __future__ import annotations

import json

import pytest

from tests import tiny_llama
from tests.evaluation.tiny_chat import write_chat_model, write_task
from vllm_jdlora.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    write_chat_model(root / "model")
    for seed, name in enumerate(("a", "b", "c", "d")):
        tiny_llama.write_adapter(root / "adapters" / name, seed, targets=["q_proj", "v_proj"])
        write_task(root / "tasks" / f"{name}.jsonl", seed, items=30)
    compress = ["compress", str(root / "adapters"), "--rank", "6", "--clusters", "2"]
    assert main([*compress, "-o", str(root / "pair")]) == 0
    entries = json.loads((root / "pair" / "collection.json").read_text())["adapters"]
    # Just under the largest error: that adapter stays uncompressed.
    strict = max(entry["relative_error"] for entry in entries) - 1e-4
    assert main([*compress, "-o", str(root / "partly"), "--max-error", str(strict)]) == 0
    return root


def command(folder, *more):
    places = ["--base-model", folder / "model", "--adapters", folder / "adapters", "--tasks", folder / "tasks"]
    return ["evaluate", *map(str, places), "--max-new-tokens", "6", *map(str, more)]


def test_collections_and_baselines_side_by_side_and_nothing_twice(folder, tmp_path, capsys):
    members: dict[int, list[str]] = {}
    for entry in json.loads((folder / "pair" / "collection.json").read_text())["adapters"]:
        members.setdefault(entry["cluster"], []).append(entry["name"])
    together = max(members.values(), key=len)[:2]
    more = [folder / "pair", "--only", *together, "--limit", "2", "--output", tmp_path / "r.jsonl"]
    more += ["--baselines", "svd", "--budget", "1/2", "--leakage", "--plots", tmp_path / "plots"]
    assert main(command(folder, *more, "--json")) == 0
    first = json.loads(capsys.readouterr().out)
    rows = {row["variant"]: row for row in first["summary"]}
    assert list(rows) == ["base", "uncompressed", "pair", "svd: pair", "svd: 1/2"]
    assert rows["uncompressed"]["agreement"] == 1 and rows["uncompressed"]["loss_change"]["mean"] == 0
    assert rows["pair"]["rouge_l"] is not None and rows["pair"]["output_error"] is None
    assert 0 < rows["pair"]["relative_error"] < 1 and rows["pair"]["adapters"] == 2
    assert rows["svd: 1/2"]["share_of_bytes"] == pytest.approx(0.5)
    assert rows["svd: pair"]["bytes_per_adapter"] <= rows["pair"]["bytes_per_adapter"]
    assert first["leakage"]["pair"]["one cluster"]["pairs"] == 2
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["bytes.svg", "error.svg"]
    lines = (tmp_path / "r.jsonl").read_text()
    assert main(command(folder, *more)) == 0
    assert (tmp_path / "r.jsonl").read_text() == lines
    shown = capsys.readouterr().out
    assert "svd: 1/2" in shown and "pairs of one cluster: 2 pairs" in shown


def test_adapters_kept_plain_are_exact_and_their_bytes_count(folder, capsys):
    manifest = json.loads((folder / "partly" / "collection.json").read_text())
    plain = manifest["plain"][0]["name"]
    assert main(command(folder, folder / "partly", "--only", plain, "--limit", "1", "--no-answers", "--json")) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["summary"]}
    assert rows["partly"]["relative_error"] == 0 and rows["partly"]["loss"] == rows["uncompressed"]["loss"]
    own = 2 * sum(entry["parameters"] for entry in manifest["plain"])
    assert rows["partly"]["bytes_per_adapter"] > own / 4


def test_output_errors_on_calibration_text_and_on_its_moments(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n\nSeven dogs.\n")
    base = ["--base-model", str(folder / "model"), "--calibration", str(tmp_path / "text.txt")]
    moments = tmp_path / "moments.safetensors"
    assert main(["calibrate", *base, "--adapters", str(folder / "adapters"), "-o", str(moments)]) == 0
    found = []
    for file in (tmp_path / "text.txt", moments):
        capsys.readouterr()
        more = [folder / "pair", "--calibration", file, "--only", "a", "--limit", "1", "--no-answers", "--json"]
        assert main(command(folder, *more)) == 0
        found.append({r["variant"]: r["output_error"] for r in json.loads(capsys.readouterr().out)["summary"]})
    assert found[0] == found[1]
    assert found[0]["base"] == pytest.approx(1) and found[0]["uncompressed"] == 0 and 0 < found[0]["pair"] < 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--only", "x"], "--only: no adapter named 'x'"),
        (["--baselines", "magic", "--budget", "1/2"], "no baseline named 'magic': choose from"),
        (["--baselines", "svd"], "name a collection, or a --budget"),
        (["COLLECTION", "--adapters", "ADAPTERS/a"], "--adapters lacks 'b'"),
        (["--tasks", "ADAPTERS"], "a.jsonl: missing"),
        (["--base-model", "ADAPTERS/a"], "no config.json"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(folder, more, reason, capsys):
    places = {"ADAPTERS": folder / "adapters", "COLLECTION": folder / "pair"}
    for word, place in places.items():
        more = [argument.replace(word, str(place)) for argument in more]
    assert main(command(folder, *more)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1 and reason in lines[0]


def test_a_collection_of_other_versions_of_the_adapters_is_refused(folder, tmp_path, capsys):
    for seed, name in enumerate(("a", "b", "c", "d")):
        tiny_llama.write_adapter(tmp_path / name, seed + 9, targets=["q_proj", "v_proj"])
    assert main(command(folder, folder / "pair", "--adapters", tmp_path)) == 2
    assert "a is another version than" in capsys.readouterr().err
