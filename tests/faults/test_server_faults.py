"""A real server whose files are damaged or taken away under load, whose engine is killed, and that is told to end.

What must hold: requests that want what is gone end with an error, all others with the right answer; an engine that was
killed ends the server, which comes up again from the same files; SIGTERM lets the requests under way finish.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import psutil
import pytest

from tests import tiny_llama, tiny_tokenizer
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.demo.server import Server, ServerFailed

pytestmark = pytest.mark.server

NAMES = [f"a{i}" for i in range(8)]
GIVEN, SHELVED = ["given0", "given1"], ["shelved0", "shelved1"]
TARGETS = ["q_proj", "v_proj"]
SCALINGS, BASES = "scalings-00000.safetensors", "bases.safetensors"
ENDED = {"error", "abort"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, a collection of eight adapters in two clusters, plain adapters, and a folder of further ones."""
    root = tmp_path_factory.mktemp("faults")
    model = tiny_tokenizer.write_tokenizer(tiny_llama.write_model(root / "model"))
    folders = [tiny_llama.write_adapter(root / "in" / name, i, targets=TARGETS) for i, name in enumerate(NAMES)]
    compress([read_adapter(folder) for folder in folders], root / "collection", rank=8, clusters=2, dtype="fp32")
    for i, name in enumerate(GIVEN):
        tiny_llama.write_adapter(root / "given" / name, 50 + i, targets=TARGETS)
    for i, name in enumerate(SHELVED):
        tiny_llama.write_adapter(root / "shelf" / name, 60 + i, targets=TARGETS)
    return SimpleNamespace(root=root, model=model, collection=root / "collection", shelf=root / "shelf")


def server_of(files, log: str) -> Server:
    """Two scaling slots and one base slot: what a request wants is read from the files again and again."""
    args = [
        *(str(files.model), "--served-model-name=base", "--dtype=float32", "--enforce-eager", "--max-model-len=256"),
        *("--kv-cache-memory-bytes=67108864", "--max-num-seqs=8", "--no-enable-prefix-caching"),
        *("--lora-compression=jd", f"--lora-collection={files.collection}", "--jd-scaling-slots=2"),
        *("--jd-base-slots=1", "--max-loras=2", f"--jd-adapter-dir={files.shelf}", "--jd-max-error=0.999"),
        *("--lora-modules", *(f"{name}={files.root / 'given' / name}" for name in GIVEN)),
        "--shutdown-timeout=60",
    ]
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "XDG_CACHE_HOME": str(files.root / "cache")}
    return Server(args, env=env, log_path=files.root / log)


@pytest.fixture(scope="module")
def server(files):
    with server_of(files, "first.log") as running:
        running.expected = {name: tokens_of(running, name) for name in ["base", *NAMES, *GIVEN, *SHELVED]}
        yield running


def ask(server, name: str, max_tokens: int = 8) -> httpx.Response:
    body = {"model": name, "prompt": [5, 9, 30, 77, 4, 200, 13], "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_tokens_as_token_ids": True, "logprobs": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def tokens_in(response: httpx.Response) -> list[str]:
    return response.json()["choices"][0]["logprobs"]["tokens"]


def tokens_of(server, name: str) -> list[str]:
    response = ask(server, name)
    assert response.status_code == 200, response.text
    return tokens_in(response)


def outcome(server, name: str) -> str:
    """``right``, ``wrong``, or how the request ended."""
    response = ask(server, name)
    if response.status_code != 200:
        return str(response.status_code)
    if (reason := response.json()["choices"][0]["finish_reason"]) != "length":
        return reason
    return "right" if tokens_in(response) == server.expected[name] else "wrong"


@contextmanager
def traffic(server, names: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Requests for these names, one after the other in two threads, as long as the block runs; (name, outcome)."""
    over, seen = threading.Event(), []

    def run(mine: list[str]) -> None:
        while not over.is_set():
            seen.extend((name, outcome(server, name)) for name in mine)

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(run, names), threads.submit(run, names[::-1])]
        try:
            until(lambda: len(seen) > 2 * len(names))
            yield seen
        finally:
            over.set()
            for each in running:
                each.result()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


def call(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def child_of(server, kind: str) -> psutil.Process:
    """A process by its title, of which the system keeps fifteen characters."""
    children = psutil.Process(server._process.pid).children(recursive=True)
    [child] = [p for p in children if p.name().startswith(f"VLLM::{kind}"[:15])]
    return child


def none_runs(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_folders_of_adapters_that_vanish_under_load_cost_no_answer(server, files, tmp_path):
    names = [NAMES[0], *GIVEN, *SHELVED, "base"]
    tiny_llama.write_adapter(files.shelf / "never-asked-for", 70, targets=TARGETS)
    with traffic(server, names) as seen:
        shutil.move(files.shelf, tmp_path / "shelf")
        shutil.move(files.root / "given", tmp_path / "given")
        before = len(seen)
        until(lambda: len(seen) > before + 4 * len(names))
        assert ask(server, "never-asked-for").status_code == 404
        refused = call(server, "load_lora_adapter", lora_name="x", lora_path=str(files.shelf / SHELVED[0]))
        assert refused.status_code == 400 and "no such folder" in refused.text
    try:
        # What came from the folder of adapters was copied, and what was given lies in the host's memory.
        assert {result for _, result in seen} == {"right"}
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        shutil.move(tmp_path / "shelf", files.shelf)
        shutil.move(tmp_path / "given", files.root / "given")
    assert ask(server, "never-asked-for").status_code == 200


@pytest.mark.parametrize("name", [SCALINGS, BASES])
def test_a_collection_that_is_truncated_under_load_ends_requests_and_not_the_server(server, files, name):
    """Each case has names of its own: one that could not be read is not tried again before a restart."""
    wanted = NAMES[:4] if name == SCALINGS else NAMES[4:]
    file, whole = files.collection / name, (files.collection / name).read_bytes()
    with traffic(server, [*wanted, "base", GIVEN[0]]) as seen:
        os.truncate(file, len(whole) // 3)
        truncated = len(seen)
        until(lambda: len({name for name, result in seen[truncated:] if result not in ("right", "wrong")}) >= 2)
        before = len(seen)
        until(lambda: len(seen) > before + 12)
        refused = call(server, "load_lora_adapter", lora_name="x", lora_path=str(files.root / "in" / NAMES[0]))
        reloaded = call(server, "reload_lora_collection")
    file.write_bytes(whole)
    assert all(result == "right" for name, result in seen if name in ("base", GIVEN[0]))
    assert all(result in ("right", "error", "500") for _, result in seen), set(seen)
    assert reloaded.status_code == 400 and "not a readable safetensors file" in reloaded.text
    if name == BASES:
        assert refused.status_code == 400, refused.text
        assert "ends too early" in refused.text or "was changed in its place" in refused.text
    else:
        assert refused.status_code == 200  # Σ of others are not needed for it
        assert call(server, "unload_lora_adapter", lora_name="x").status_code == 200
    log = server.log_path.read_text()
    assert f"{name}: ends too early" in log or f"{name}: was changed in its place" in log
    assert outcome(server, "base") == "right" and httpx.get(f"{server.url}/health").status_code == 200


def test_a_process_that_is_killed_ends_the_server_which_comes_up_again_from_the_same_files(server, files):
    check_that_a_kill_ends_it(server, "Worker")

    # Damaged before the start: it does not come up, and says which file.
    whole = (files.collection / SCALINGS).read_bytes()
    os.truncate(files.collection / SCALINGS, len(whole) - 100)
    with pytest.raises(ServerFailed, match=SCALINGS), server_of(files, "damaged.log"):
        pass
    (files.collection / SCALINGS).write_bytes(whole)

    with server_of(files, "second.log") as again:
        for name, expected in server.expected.items():
            assert tokens_of(again, name) == expected, name
        check_that_a_kill_ends_it(again, "EngineCore")


def check_that_a_kill_ends_it(server, kind: str) -> None:
    processes = psutil.Process(server._process.pid).children(recursive=True)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, server, name, 200) for name in ["base", *GIVEN] * 8]
        until(lambda: any(future.done() for future in asked))
        killed = time.monotonic()
        child_of(server, kind).send_signal(signal.SIGKILL)
        for future in asked:
            try:
                answer = future.result()
            except httpx.TransportError:
                continue
            whole = answer.status_code == 200 and len(tokens_in(answer)) == 200
            assert whole or answer.status_code >= 500, answer.text
    until(lambda: server.exit_code() is not None)
    assert time.monotonic() - killed < 30
    assert "EngineDeadError" in server.log_path.read_text()
    until(lambda: none_runs(processes))


def test_sigterm_lets_the_requests_under_way_finish(files):
    arrivals = files.root / "cache" / "vllm-jdlora" / "arrivals"
    with server_of(files, "last.log") as server:
        assert ask(server, SHELVED[0]).status_code == 200 and list(arrivals.glob("*/adapters/*"))
        processes = psutil.Process(server._process.pid).children(recursive=True)
        with ThreadPoolExecutor(24) as threads:
            asked = [threads.submit(ask, server, name, 200) for name in [*NAMES, *GIVEN, *SHELVED] * 2]
            until(lambda: any(future.done() for future in asked))
            told = time.monotonic()
            server._process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in asked]
        until(lambda: server.exit_code() is not None)
        assert time.monotonic() - told < 60 and server.exit_code() == 0
        assert [(a.status_code, len(tokens_in(a))) for a in answers] == [(200, 200)] * len(asked)
        until(lambda: none_runs(processes))
        assert not list(arrivals.glob("*/adapters"))
