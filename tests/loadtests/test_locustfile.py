"""The locustfile under the real locust: headless with its CSV, as a web page, and in two processes."""

import asyncio
import csv
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from tests.loadtests.openai_server import event, piece, serving, streamed, usage
from vllm_jdlora.demo.server import free_port

# Importing locust here would let gevent patch the whole test process.
if importlib.util.find_spec("locust") is None:
    pytest.skip("the extra `loadtest` is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
MODELS = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in ("good", "also-good", "gone"))]


async def answer(request, body):
    if body["model"] == "gone":
        return web.json_response({"error": "no such model"}, status=404)
    tokens = body["max_tokens"]
    events = [event(piece("a "))] * tokens
    return await streamed(request, *events, event(usage(7, tokens)), event(b"[DONE]"), pause=0.01)


@pytest.fixture
def server():
    """(url, bodies received) of a server in a thread of its own."""
    loop, ready, where = asyncio.new_event_loop(), threading.Event(), []

    async def serve():
        async with serving(answer, models=MODELS) as (url, bodies):
            where.extend((url, bodies, stop := asyncio.Event()))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield where[0], where[1]
    loop.call_soon_threadsafe(where[2].set)
    thread.join()


def locust(url, *flags):
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "--host", url, *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SHORT = ("--headless", "--users=4", "--spawn-rate=4", "--run-time=3s", "--output-tokens", "3", "6")


def rows(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_headless_statistics_and_totals_agree_with_what_the_server_saw(server, tmp_path):
    url, bodies = server
    run = locust(url, *SHORT, "--base-share=0.2", "--popularity=distinct", "--csv", str(tmp_path / "out"))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1, output  # as always with Locust where requests failed
    asked = Counter(body["model"] for body in bodies)
    assert set(asked) == {"base", "good", "also-good", "gone"} and all(body["ignore_eos"] for body in bodies)
    (totals,) = rows(tmp_path / "out_traffic.csv")
    finished, failed = int(totals["requests"]), int(totals["errors"].removeprefix("http 404 "))
    # Users are stopped in the middle of an answer: the last of each of the four is not counted.
    assert asked["gone"] - 4 <= failed <= asked["gone"]
    assert asked.total() - 4 <= finished + failed <= asked.total()
    assert 3 < float(totals["output tokens/s"]) / float(totals["requests/s"]) < 5
    # Locust's own file is up to a second old.
    stats = {(row["Type"], row["Name"]): row for row in rows(tmp_path / "out_stats.csv")}
    assert {kind for kind, _ in stats} == {"TTFT", "inter-token", "end-to-end", ""}
    count = {key: int(row["Request Count"]) for key, row in stats.items()}
    assert 0 < count["TTFT", "adapters"] + count["TTFT", "base"] <= finished
    assert 0 < int(stats["end-to-end", "adapters"]["Failure Count"]) <= failed
    assert float(stats["inter-token", "base"]["Min Response Time"]) >= 9  # the server's pause, ms
    assert "SLO attainment" in output and "RequestFailed('http 404')" in output


def test_two_processes_add_up_and_a_missed_limit_is_the_exit_code(server, tmp_path):
    url, bodies = server
    names = tmp_path / "names"
    names.write_text("good\nalso-good\n")
    missed = ("--ttft-slo=0.000001", "--least-attainment=0.5")
    run = locust(url, *SHORT, "--processes=2", "--adapters-file", str(names), "--csv", str(tmp_path / "out"), *missed)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 1, output
    (totals,) = rows(tmp_path / "out_traffic.csv")
    assert totals["errors"] == "" and totals["SLO attainment"] == "0.0000"
    assert 0 <= len(bodies) - int(totals["requests"]) <= 4
    assert {body["model"] for body in bodies} == {"good", "also-good"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_number_of_requests_ends_the_test_when_each_has_its_whole_answer(server, tmp_path, processes):
    url, bodies = server
    names = tmp_path / "names"
    names.write_text("good\nalso-good\n")
    work = ("--headless", "--users=4", "--spawn-rate=4", "--requests=11", "--output-tokens", "3", "6")
    more = ("--processes=2",) if processes > 1 else ()
    run = locust(url, *work, *more, "--adapters-file", str(names), "--csv", str(tmp_path / "out"))
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    (totals,) = rows(tmp_path / "out_traffic.csv")
    assert int(totals["requests"]) == len(bodies) == 11 * processes and totals["errors"] == ""


def test_the_web_page_shows_the_totals(server):
    url, _ = server
    port = free_port()
    run = locust(url, "--users=2", "--autostart", f"--web-port={port}", "--output-tokens", "3", "6")
    try:
        deadline = time.monotonic() + 60
        shown = {}
        while time.monotonic() < deadline and not int(shown.get("requests") or 0):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats/requests", timeout=5) as response:
                    (table,) = json.load(response)["extended_stats"]
                    (shown,) = table["data"]
            except OSError:
                assert run.poll() is None, run.stdout.read()
        assert table["key"] == "traffic" and int(shown["requests"]) > 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
            assert '"Traffic"' in response.read().decode()
    finally:
        run.terminate()
        run.wait(30)


def test_a_server_that_is_not_there_ends_the_test_with_the_reason():
    run = locust("http://127.0.0.1:9", *SHORT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2 and "cannot start" in output and "OpenAI-compatible" in output
