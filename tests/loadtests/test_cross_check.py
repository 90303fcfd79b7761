"""Locust and ``vllm bench serve``, the real ones, against a server whose pace is known: both must measure it."""

import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtests.openai_server import event, piece, serving, streamed, usage
from tests.tiny_tokenizer import write_tokenizer

for module in ("locust", "vllm"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[2]
USERS, TOKENS, REQUESTS, PAUSE = 4, 10, 24, 0.05
MODELS = [{"id": "base", "parent": None}, {"id": "one", "parent": "base"}, {"id": "other", "parent": "base"}]


async def answer(request, body):
    """A token every `PAUSE` seconds."""
    events = [event(piece("a "))] * body["max_tokens"]
    prompt = body["prompt"]
    return await streamed(request, *events, event(usage(len(prompt), len(events))), event(b"[DONE]"), pause=PAUSE)


def test_both_send_the_same_load_and_measure_the_pace_of_the_server(model):
    write_tokenizer(model, chat=False)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 252}))
    flags = ["--users", USERS, "--prompt-tokens=16", "--output-tokens", TOKENS, "--requests", REQUESTS, "--rounds=1"]

    async def check():
        async with serving(answer, models=MODELS) as (url, bodies):
            command = [sys.executable, str(ROOT / "loadtests" / "cross_check.py"), "--url", url]
            command += ["--tokenizer", str(model), *map(str, flags), "--within=0.1"]
            env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            return await asyncio.to_thread(subprocess.run, command, env=env, capture_output=True, text=True), bodies

    done, bodies = asyncio.run(check())
    assert done.returncode == 0, done.stdout + done.stderr
    rates = {name: float(rate) for name, rate in re.findall(r"round 1, (.+): ([\d.]+) output tokens/s", done.stdout)}
    # The server also pauses after the two events that close an answer.
    pace = USERS / PAUSE * TOKENS / (TOKENS + 2)
    assert rates == {"vllm bench serve": pytest.approx(pace, rel=0.1), "locust": pytest.approx(pace, rel=0.1)}
    # Locust warms up, then each has its round.
    by_text = [body for body in bodies if isinstance(body["prompt"], str)]
    by_ids = [body for body in bodies if not isinstance(body["prompt"], str)]
    assert (len(by_text), len(by_ids)) == (REQUESTS, 2 * REQUESTS)
    for body in by_text + by_ids:
        assert body["model"] in ("one", "other")
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (TOKENS, 0, True)
    assert {body["model"] for body in by_text} == {body["model"] for body in by_ids} == {"one", "other"}
    assert {len(body["prompt"]) for body in by_ids} == {16}
