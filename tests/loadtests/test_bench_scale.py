"""A run of the scale benchmark from flags to record and picture, against servers that answer at once."""

import asyncio
import json
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from aiohttp import web

from tests.loadtests.openai_server import every_token


class Instant:
    """Stands in for `vllm serve`: same life and paths, no model."""

    made: ClassVar[list] = []

    def __init__(self, arguments, *, env, timeout, log_path):
        self.arguments, self.env, self.log_path = arguments, env, log_path
        self.bodies: list[dict] = []
        self.steps = None
        Instant.made.append(self)

    def start(self):
        self.log_path.write_text("one line\n")
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._application())
        self._loop.run_until_complete(self._runner.setup())
        self._loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(self.port)])

    def stop(self):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._process.kill()
        self._process.wait()

    def _application(self):
        async def complete(request):
            body = await request.json()
            self.bodies.append(body)
            return await every_token(request, body)

        async def call(request):
            method = (await request.json())["method"]
            if method == "start_lora_clock":
                self.steps = len(self.bodies)
            answers = {"read_lora_clock": {"microseconds": [20.0, 30.0]}, "jdlora_statistics": {"known": 1}}
            return web.json_response({"results": [answers.get(method)]})

        async def models(request):
            return web.json_response({"data": [{"id": "base"}]})

        async def metrics(request):
            return web.Response(text="a 1\nb 2\n")

        app = web.Application()
        app.add_routes([web.post("/v1/completions", complete), web.post("/collective_rpc", call)])
        app.add_routes([web.get("/v1/models", models), web.get("/metrics", metrics)])
        return app


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = {**sizes, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def bench_scale(monkeypatch):
    import bench_scale

    Instant.made = []
    monkeypatch.setattr(bench_scale, "Server", Instant)
    monkeypatch.setattr(bench_scale, "stop_on_termination", lambda: None)
    return bench_scale


def run(bench_scale, monkeypatch, tmp_path, *flags):
    results = tmp_path / "scale.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_scale", "--results", str(results), "--dtype", "float32", *flags])
    bench_scale.main()
    (line,) = results.read_text().splitlines()
    return json.loads(line)


def test_one_run_gives_one_record_and_a_picture(bench_scale, monkeypatch, tmp_path, model):
    picture = tmp_path / "scale.svg"
    flags = ("--model", str(model), "--sizes", "50", "200", "--rounds", "3", "--requests", "10", "--cold", "20")
    record = run(bench_scale, monkeypatch, tmp_path, *flags, "--starts", "2", "--plot", str(picture))
    small, large = record["served"]
    assert (small["adapters"], large["adapters"]) == (50, 200) and small["cold"] == {}
    for size in (small, large):
        assert len(size["beside_reference"]["own"]["tokens_per_second"]) == 3
        assert size["beside_reference"]["reference"]["ttft_seconds"]["count"] == 30
        assert size["beside_reference"]["own"]["host_microseconds"] == {"count": 2, "p50": 25, "p90": 29, "p99": 29.9}
        assert sum(memory["anonymous"] for memory in size["memory_bytes"].values()) > 0
    assert {kind: found["count"] for kind, found in large["cold"]["disk"].items() if kind in ("cold", "warm")} == {
        "cold": 20,
        "warm": 20,
    }
    assert {name: len(found["seconds"]) for name, found in record["starts"].items()} == {"base": 2, "50": 2, "200": 2}
    assert "adapters known" in picture.read_text()
    # Reference, each size beside it, the base once for the caches, and two rounds of three.
    assert len(Instant.made) == 1 + 2 + 1 + 6
    base = [s for s in Instant.made if not any("lora" in a for a in s.arguments)]
    assert len(base) == 3


def test_cold_adapters_are_asked_for_once_and_no_prompt_comes_twice(bench_scale, monkeypatch, tmp_path, model):
    flags = ("--model", str(model), "--sizes", "40", "400", "--rounds", "2", "--requests", "30", "--cold", "25")
    run(bench_scale, monkeypatch, tmp_path, *flags, "--starts", "0")
    reference, same, large = Instant.made
    assert reference.steps and same.steps and large.steps  # the clock starts after the warm-up
    single = [body for body in large.bodies if body["max_tokens"] == 1 and len(body["prompt"]) == 64]
    counts = {}
    for body in single:
        counts[body["model"]] = counts.get(body["model"], 0) + 1
    upper = [name for name in counts if int(name.rpartition("-")[2]) >= 200]
    assert len(upper) == 50 and all(counts[name] == 1 for name in upper)
    assert sum(counts.values()) == 100
    for server in (reference, same, large):
        prompts = [tuple(body["prompt"]) for body in server.bodies if len(body["prompt"]) == 64]
        assert len(set(prompts)) == len(prompts)
    # Every round asks each of the two for the same number of requests.
    assert [len([b for b in s.bodies if b["max_tokens"] == 48]) for s in (reference, same, large)] == [180, 90, 90]


def test_a_request_that_fails_ends_the_run(bench_scale, monkeypatch, tmp_path, model):
    from vllm_jdlora.errors import JDLoRAError

    async def broken(request, body):
        return web.Response(status=500, text="no")

    monkeypatch.setattr(sys.modules[__name__], "every_token", broken)
    with pytest.raises(JDLoRAError, match="0 of 48 tokens: http 500"):
        run(bench_scale, monkeypatch, tmp_path, "--model", str(model), "--sizes", "5", "--starts", "0")


def test_the_parts_can_be_measured_apart_and_are_drawn_together(bench_scale, monkeypatch, tmp_path, model):
    from plot_scale import newest

    flags = ("--model", str(model), "--requests", "4", "--cold", "5")
    run(bench_scale, monkeypatch, tmp_path, *flags, "--sizes", "5", "20", "--rounds", "2", "--starts", "0")
    results = tmp_path / "scale.jsonl"
    first = results.read_text()
    results.unlink()
    Instant.made = []
    record = run(bench_scale, monkeypatch, tmp_path, *flags, "--sizes", "5", "30", "--rounds", "0", "--starts", "1")
    assert record["served"] == [] and set(record["starts"]) == {"base", "5", "30"}
    assert len(Instant.made) == 3 + 3  # each once for the caches
    results.write_text(first + results.read_text())
    figures = newest(results)
    assert [s["adapters"] for s in figures.served] == [5, 20]
    assert {size: found[0] for size, found in figures.starts.items()} == {n: record["starts"][str(n)] for n in (5, 30)}
