"""Figure 1 with real servers of a tiny model: stock and compressed beside the base, from flags to results."""

import json
import sys

import pytest

pytestmark = pytest.mark.server

FLAGS = """--synthetic --series c f --points 8 --users 4 --seconds 2 --settle 1 --least-turns 1 --most-turns 1
    --dtype float32 --kv-cache-bytes 67108864 --prompt-tokens 4 16 --output-tokens 4 16"""


def test_real_servers_take_turns_and_give_every_token(tmp_path, monkeypatch, capsys):
    import figure1

    from tests.tiny_llama import write_model
    from tests.tiny_tokenizer import write_tokenizer

    model = write_model(write_tokenizer(tmp_path / "model"))
    results = tmp_path / "figure1.jsonl"
    paths = ["--model", str(model), "--results", str(results), "--logs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["figure1", *paths, "--picture", str(tmp_path / "figure1.svg"), *FLAGS.split()])
    figure1.main()
    points = {v["point"]["series"]: v for v in map(json.loads, results.read_text().splitlines())}
    assert set(points) == {"c", "f"}
    for values in points.values():
        for turn in (*values["base"], *values["server"]):
            assert turn["errors"] == {} and turn["finished"] > 0 and turn["ttft"]["p50"] > 0
            # Lengths are those of the trace: 4 to 15 tokens.
            assert 4 <= turn["output_tokens_per_second"] / turn["requests_per_second"] <= 20
    assert "no error: 0, met" in capsys.readouterr().out
