"""A short soak of the real server: everything at once, from flags to the record and its picture."""

import json
import sys

import pytest

pytestmark = pytest.mark.server

FLAGS = """--minutes 0.5 --adapters 40 --capacity-seconds 8 --checked 30 --dtype float32 --eager
    --hostile 0.3 --calls 0.8 --least-reload 6 --look 1"""


def test_a_short_soak_holds_all_that_it_can_judge(tmp_path, monkeypatch, capsys):
    import soak

    results, picture = tmp_path / "soak.jsonl", tmp_path / "soak.svg"
    paths = ["--scratch", str(tmp_path), "--results", str(results), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["soak", *FLAGS.split(), *paths])
    monkeypatch.setattr("os.nice", lambda more: more)  # not for the tests after this one
    soak.main()
    assert "BROKEN" not in capsys.readouterr().out
    [record] = [json.loads(line) for line in results.read_text().splitlines()]
    assert record["versions"]["vllm"] and record["commit"] and not record["interrupted"]
    held = {verdict["name"]: verdict["held"] for verdict in record["verdicts"]}
    assert all(held[name] for name in held if "flat" not in name), held
    assert [name for name, value in held.items() if value is None] == [name for name in held if "flat" in name]
    assert record["soak"]["ends"]["whole"] >= 20 and record["checked"]["answers"] >= 10
    assert record["checked"]["others"] > record["checked"]["confused"] == 0
    kinds = {kind for kind, *_ in record["events"]}
    assert {"load", "reload", "reload, other bases"} <= kinds
    assert record["paused_seconds"] and not any(record["paused_seconds"])
    assert len(record["hostile"]["statuses"]) >= 15 and not record["hostile"]["wrong"]
    assert len(record["counts"]) == 18 and record["pieces"][-1]["at"] >= 20
    assert "collection reloaded" in picture.read_text()
