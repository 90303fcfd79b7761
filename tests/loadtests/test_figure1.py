"""A run of Figure 1 from flags to results, tables and picture, with servers that are up at once."""

import json
import sys
from typing import ClassVar

import pytest

from vllm_jdlora.errors import JDLoRAError

pytest.importorskip("matplotlib")


class Instant:
    """Stands in for a server."""

    started: ClassVar[list] = []
    dies: ClassVar[tuple] = ()

    def __init__(self, arguments, *, timeout, log_path):
        self.arguments, self.log_path, self.url, self.up = arguments, log_path, f"http://{log_path.stem}", False

    def __enter__(self):
        assert not any(server.up for server in Instant.started[1:]), "one server beside the base"
        Instant.started.append(self)
        if self.log_path.stem in Instant.dies:
            raise JDLoRAError("no room")
        self.up = True
        return self

    def __exit__(self, *_):
        self.up = False

    def exit_code(self):
        return None


SPEED = {"b": 0.4, "c": 0.2, "c-default": 0.1, "d": 0.25, "e": 0.9, "f": 1.0, "f8": 1.0, "f-rank16": 1.0}


def run(monkeypatch, tmp_path, model, *flags, dies=(), real=False):
    import figure1
    from figure1_turns import Turns
    from openai_client import Timing
    from traffic_summary import summarise

    asked = []

    def turn(tokens):
        return summarise([Timing("m", 0, 1.0, (0.5,) * tokens, 1, tokens)], 0, 1)

    def turns(base, server, trace, spec, *, on_turn):
        series = server.url.removeprefix("http://").rpartition("-")[0]
        asked.append((series, len(server.adapters)))
        assert trace.spec.adapters == len(server.adapters) and base.adapters is None
        on_turn("turn 1")
        return Turns([turn(1000)] * 2, [turn(int(1000 * SPEED[series]))] * 2)

    async def warmed(target, trace, spec):
        pass

    Instant.started, Instant.dies = [], dies
    monkeypatch.setattr(figure1, "Server", Instant)
    monkeypatch.setattr(figure1, "take_turns", turns)
    monkeypatch.setattr(figure1, "warm_up", warmed)
    monkeypatch.setattr(figure1, "stop_on_termination", lambda: None)
    results, picture = tmp_path / "figure1.jsonl", tmp_path / "figure1.svg"
    paths = ["--model", str(model), "--results", str(results), "--picture", str(picture), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["figure1", *paths, *([] if real else ["--synthetic"]), *flags])
    code = 0
    try:
        figure1.main()
    except SystemExit as stopped:
        code = stopped.code
    assert not any(server.up for server in Instant.started)
    return code, asked, results, picture


def test_a_run_measures_reports_and_draws(monkeypatch, tmp_path, model, capsys):
    flags = ("--points", "4", "64", "1024")
    code, asked, results, picture = run(monkeypatch, tmp_path, model, *flags)
    assert code == 0
    points = [(key, n) for n in (4, 64, 1024) for key in "cdef"]
    others = {("f8", 64), ("f8", 1024), ("f-rank16", 4), ("f-rank16", 64), ("f-rank16", 1024)}
    assert set(asked) == {*points, *others, ("b", 1), ("c-default", 1024)} and len(asked) == 19
    shown = capsys.readouterr().out
    assert "(f)/(a) >= 0.95 at 1,024: 1, met" in shown and "(f)/(c) >= 4 at 1,024: 5, met" in shown
    assert "from 64 to 1,024 adapters within 3%: 0, met" in shown and "no error: 0, met" in shown
    assert "(f) compressed" in picture.read_text()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == 19 and all(len(line["base"]) == 2 and "commit" in line["conditions"] for line in lines)
    assert len({json.dumps(line["settings"]) for line in lines}) == 1


def test_a_run_that_is_given_again_goes_on_where_it_was(monkeypatch, tmp_path, model):
    _, first, *_ = run(monkeypatch, tmp_path, model, "--points", "4", "--series", "c", "f")
    _, second, *_ = run(monkeypatch, tmp_path, model, "--points", "4", "8", "--series", "c", "f")
    assert set(first) == {("c", 4), ("f", 4)} and set(second) == {("c", 8), ("f", 8)}
    _, third, *_ = run(monkeypatch, tmp_path, model, "--points", "4", "8", "--series", "c", "f")
    assert third == [] and Instant.started == [], "nothing is started for nothing"
    _, other, *_ = run(monkeypatch, tmp_path, model, "--points", "4", "--series", "f", "--users", "8")
    assert other == [("f", 4)], "with other settings it is another figure"
    _, clusters, *_ = run(monkeypatch, tmp_path, model, "--points", "8", "--series", "f", "--clusters", "8=1")
    assert clusters == [("f", 8)], "with other clusters it is another point"


def test_a_point_whose_server_dies_is_named_and_the_others_go_on(monkeypatch, tmp_path, model, capsys):
    code, asked, results, _ = run(monkeypatch, tmp_path, model, "--points", "4", "--series", "c", "f", dies=("c-4",))
    assert code == 1 and asked == [("f", 4)] and len(results.read_text().splitlines()) == 1
    assert "not measured: (c) 4: no room" in capsys.readouterr().out


def test_servers_get_what_their_points_say(monkeypatch, tmp_path, model):
    run(monkeypatch, tmp_path, model, "--points", "64", "1024", "--users", "16")
    by_name = {server.log_path.stem: server.arguments for server in Instant.started}
    shared = {"--max-num-seqs=16", "--no-enable-prefix-caching", "--served-model-name=base", "--max-model-len=256"}
    assert all(shared <= set(arguments) for arguments in by_name.values())
    assert not any("lora" in argument for argument in by_name["a"])
    stock = by_name["c-64"]
    assert "--enable-lora" in stock and "--max-cpu-loras=64" in stock and "--lora-target-modules" in stock
    assert sum("=" in a and a.startswith("synthetic") for a in stock) == 64
    assert "--max-loras=64" in by_name["d-64"] and "--lora-target-modules" not in by_name["c-default-1024"]
    equal = next(a for a in stock if a.startswith("--max-loras"))
    assert equal in by_name["e-64"] and "--lora-compression=jd" in by_name["e-64"] and equal != "--max-loras=64"
    # Or bases would be padded to vLLM's 16.
    assert "--max-lora-rank=8" in by_name["f-64"] and "--max-lora-rank=16" in by_name["f-rank16-64"]
    assert "--lora-modules" not in by_name["f-64"] and "--enable-lora" not in by_name["f-64"]


def test_real_adapters_are_used_as_far_as_they_go_and_their_error_is_stated(monkeypatch, tmp_path, capsys):
    from tests.tiny_llama import write_adapter, write_model

    model = write_model(tmp_path / "tiny")
    for i in range(4):
        write_adapter(tmp_path / "real" / f"adapter-{i}", i, rank=4, targets=["q_proj", "k_proj", "v_proj"])
    flags = ("--adapters", str(tmp_path / "real"), "--points", "4", "8", "--series", "c", "f")
    code, _, results, _ = run(monkeypatch, tmp_path, model, *flags, real=True)
    assert code == 0
    lines = {
        (v["point"]["series"], v["point"]["adapters"]): v for v in map(json.loads, results.read_text().splitlines())
    }
    assert lines["f", 4]["real"] and lines["c", 4]["real"] and not lines["f", 8]["real"]
    # Two adapters of rank 4 in a cluster of rank 8 lose nothing; the random ones were not compressed.
    assert lines["f", 4]["error"]["max"] < 0.02 and lines["f", 8]["error"] is None
    assert "4: 0.0" in capsys.readouterr().out


def test_a_point_without_room_is_left_out_with_the_numbers(monkeypatch, tmp_path, model, capsys):
    import figure1

    monkeypatch.setattr(figure1, "available_bytes", lambda: 10**9)
    code, asked, *_ = run(monkeypatch, tmp_path, model, "--points", "4", "--series", "f")
    assert code == 1 and not asked and "needs 2.0 GB of memory and 1.0 GB are free" in capsys.readouterr().out
