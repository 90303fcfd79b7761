"""A server under mixed traffic while its adapters come, change and go and its collection is swapped.

Every answer must be that of a content which its adapter's name had between the request and the answer, and where the
name had none, 404. ``JDLORA_CHURN_SECONDS`` sets how long (default 20).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from tests import reference
from tests.serving import churn_adapters as adapters
from tests.serving.churn_adapters import Content
from tests.serving.conftest import SERVER_ARGS
from tests.serving.name_history import History, Spell

pytestmark = pytest.mark.server

SECONDS = float(os.environ.get("JDLORA_CHURN_SECONDS", "20"))
CLIENTS = 6
# fp32 on both sides through thirty layers.
TOLERANCE = 2e-3
# Bytes that all processes may hold more at the end than after a third of the time: caches that fill, not leaks.
GROWTH = 64 << 20
PROMPTS = [
    "The opposite of hot is cold, the opposite of big is small, and the opposite of long, if you ask me again, is",
    "Once upon a time there was a little girl who lived in the woods with her old grandmother, and one day she went",
    "The capital of France is Paris, the capital of Italy is Rome, the capital of Spain is Madrid, and that of Greece",
]


@dataclass
class Answer:
    name: str
    prompt: int
    sent: float
    answered: float
    status: int
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def collections(base_model, tmp_path_factory):
    """Three revisions of 200 adapters: the second has the first's bases, the third others."""
    root = tmp_path_factory.mktemp("churn")
    first = {f"c{i:03d}": Content(1, i) for i in range(200)}
    second = {
        name: Content(1, 500 + i) if i % 10 == 0 else c for i, (name, c) in enumerate(first.items()) if i % 20 != 7
    }
    second |= {f"n{i:03d}": Content(1, 800 + i) for i in range(10)}
    third = {name: Content(2, 2000 + i) for i, name in enumerate(second)}
    made = {}
    for name, contents in (("first", first), ("second", second), ("third", third)):
        made[str(adapters.write_collection(root / name, base_model, contents))] = contents
    return made


@pytest.fixture(scope="module")
def folders(base_model, tmp_path_factory):
    """PEFT folders: near the first bases, near the second ones, and near none."""
    root = tmp_path_factory.mktemp("arriving")
    contents = [Content(1, 3000 + i) for i in range(5)] + [Content(2, 3100), Content(None, 3200), Content(None, 3201)]
    return {c: str(adapters.write_folder(root / str(i), base_model, c)) for i, c in enumerate(contents)}


@pytest.fixture(scope="module")
def server(base_model, collections, tmp_path_factory):
    from vllm_jdlora.demo.server import Server

    args = [
        *(str(base_model), *SERVER_ARGS, "--enforce-eager", "--block-size=32"),
        *("--lora-compression=jd", "--jd-max-error=0.3"),
        *(f"--lora-collection={next(iter(collections))}", "--jd-scaling-slots=64", "--max-loras=2"),
    ]
    env = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
    }
    with Server(args, env=env, log_path=tmp_path_factory.mktemp("logs") / "churn.log") as server:
        server.arrivals = Path(env["XDG_CACHE_HOME"]) / "vllm-jdlora" / "arrivals"
        yield server


async def traffic(client, history: History, prompts: list[list[int]], answers: list[Answer], until: float, seed: int):
    """One client: an adapter at random, one that was known at some time, or the base model."""
    draw = random.Random(seed)
    while time.monotonic() < until:
        recent = [name for name, s in history.spells.items() if len(s) > 1 or not name.startswith("c")]
        name = draw.choice(recent if recent and draw.random() < 0.6 else [*history.spells])
        prompt = draw.randrange(len(prompts))
        body = {"model": name, "prompt": prompts[prompt], "max_tokens": draw.randint(2, 5), "temperature": 0}
        sent = time.monotonic()
        response = await client.post("/v1/completions", json=body | {"logprobs": 1, "return_tokens_as_token_ids": True})
        answered = time.monotonic()
        found = response.json()["choices"][0]["logprobs"] if response.status_code == 200 else None
        tokens = [int(t.removeprefix("token_id:")) for t in found["tokens"]] if found else []
        logprobs = found["token_logprobs"] if found else []
        answers.append(Answer(name, prompt, sent, answered, response.status_code, tokens, logprobs))


async def churn(client, history: History, collections, folders, until: float) -> dict[str, int]:
    """Load, replace, unload and swap, one after the other; how often each was done."""
    draw, done = random.Random(7), {"load": 0, "replace": 0, "unload": 0, "swap": 0}
    # To the first's bases and others, in both directions.
    revisions = itertools.cycle([1, 2, 1, 0, 2, 0])
    own = [f"r{i}" for i in range(6)]

    async def call(path: str, body: dict) -> tuple[float, float, httpx.Response]:
        called = time.monotonic()
        response = await client.post(path, json=body)
        assert response.status_code == 200, (path, body, response.text)
        return called, time.monotonic(), response

    while time.monotonic() < until:
        await asyncio.sleep(draw.uniform(0, 0.2))
        known = history.now()
        what = draw.choices([*done], weights=[4, 4, 3, 1])[0]
        if sum(done.values()) % 8 == 7:
            what = "swap"  # often enough in a short run too
        if what in ("load", "replace"):
            names = [n for n in own if (n in known) == (what == "replace")]
            if what == "replace" and draw.random() < 0.4:
                names = [n for n in known if n.startswith("c")]
            if not names:
                continue
            name, (content, folder) = draw.choice(names), draw.choice([*folders.items()])
            body = {"lora_name": name, "lora_path": folder, "load_inplace": what == "replace"}
            called, answered, response = await call("/v1/load_lora_adapter", body)
            assert ("compressed into cluster" in response.text) or ("kept uncompressed" in response.text)
            history.change(name, content, called, answered)
        elif what == "unload":
            names = [n for n in own if n in known] or ["c001"]
            if names == ["c001"] and "c001" not in known:
                continue
            name = draw.choice(names)
            called, answered, _ = await call("/v1/unload_lora_adapter", {"lora_name": name})
            history.change(name, None, called, answered)
        else:
            path, contents = [*collections.items()][next(revisions)]
            called, answered, response = await call("/v1/reload_lora_collection", {"lora_collection": path})
            for name in [n for n in history.spells if n not in own]:
                history.change(name, contents.get(name), called, answered)
            for name, content in contents.items():
                history.change(name, content, called, answered)
        done[what] += 1
    return done


def anonymous_bytes(server) -> int:
    """Memory of no file, of all the server's processes."""
    group, total = os.getpgid(server._process.pid), 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                total += sum(int(line.split()[1]) << 10 for line in status.open() if line.startswith("RssAnon"))
        except (ProcessLookupError, FileNotFoundError):
            continue
    return total


async def run(server, history, prompts, collections, folders):
    answers: list[Answer] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        begin = time.monotonic()
        until = begin + SECONDS
        clients = [traffic(client, history, prompts, answers, until, seed) for seed in range(CLIENTS)]
        work = asyncio.gather(churn(client, history, collections, folders, until), *clients)

        async def measure():
            await asyncio.sleep(SECONDS / 3)
            return anonymous_bytes(server)

        early, (done, *_) = await asyncio.gather(measure(), asyncio.wait_for(work, SECONDS + 120))
        late = anonymous_bytes(server)
        listed = (await client.get("/v1/models")).json()["data"]
        reused = re.findall(r"^vllm:prefix_cache_hits_total\S* (\S+)$", (await client.get("/metrics")).text, re.M)
        assert sum(map(float, reused)) > 0
        for name in [n for n, content in history.now().items() if content in folders]:
            assert (await client.post("/v1/unload_lora_adapter", json={"lora_name": name})).status_code == 200
    return answers, done, early, late, {m["id"] for m in listed}


def matches(model, prompt: list[int], answer: Answer) -> bool:
    try:
        reference.check_greedy(model, prompt, answer.tokens, answer.logprobs, TOLERANCE)
    except AssertionError:
        return False
    return True


def test_every_answer_is_of_a_content_that_its_name_had(
    server, base_model, tokenizer, reference_model, collections, folders
):
    first = next(iter(collections.values()))
    history = History({name: [Spell(content, 0.0)] for name, content in first.items()})
    history.spells["base"] = [Spell(None, 0.0)]  # the base model is no adapter, and always there
    # Longer than a block of 32 tokens, so that blocks of the prefix cache are reused, and must be the right ones.
    prompts = [tokenizer(2 * text)["input_ids"][:44] for text in PROMPTS]
    answers, done, early, late, listed = asyncio.run(run(server, history, prompts, collections, folders))
    print(f"{len(answers)} answers; {done}; {early >> 20} -> {late >> 20} MiB")

    assert not [a for a in answers if a.status not in (200, 404)]
    assert listed == {"base", *history.now()}
    assert all(count >= 2 for count in done.values()), done
    assert late - early < GROWTH, f"{(late - early) >> 20} MiB more"

    open_questions: dict[Content | None, list[Answer]] = {}
    for answer in answers:
        possible = history.possible(answer.name, answer.sent, answer.answered)
        if answer.status == 404:
            assert None in possible and answer.name != "base", answer
        else:
            for content in possible:
                if content is not None or answer.name == "base":
                    open_questions.setdefault(content, []).append(answer)
    explained, refuted, tried = set(), 0, 0
    for content, asked in open_questions.items():
        with torch.no_grad(), reference.merged(reference_model, adapters.deltas(base_model, content)) as merged:
            for answer in asked:
                if matches(merged, prompts[answer.prompt], answer):
                    explained.add(id(answer))
            other = next((a for a in answers if a.status == 200 and a not in asked), None)
            if other is not None and tried < 20:
                tried += 1
                refuted += not matches(merged, prompts[other.prompt], other)
    wrong = [a for a in answers if a.status == 200 and id(a) not in explained]
    assert not wrong, f"{len(wrong)} of {len(answers)} answers are of no content that the name had: {wrong[:3]}"
    assert refuted == tried > 0  # another adapter's answer is told from the right one

    deadline = time.monotonic() + 60
    while left := [p for p in server.arrivals.glob("0/*") if p.name != "adapters"] + [
        *server.arrivals.glob("0/adapters/*")
    ]:
        assert time.monotonic() < deadline, f"files of adapters that nobody uses: {left}"
        time.sleep(0.5)
