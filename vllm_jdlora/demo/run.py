"""The demonstration, step by step: base model, compression, server, and answers beside those without compression."""

from __future__ import annotations

import functools
import shlex
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from vllm_jdlora.adapter import Adapter, file_digest, read_adapters
from vllm_jdlora.cache import cache_root
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.demo.base_model import MODEL_NAME, prepare_base_model
from vllm_jdlora.demo.environment import Environment, check_environment
from vllm_jdlora.demo.progress import Step, Steps
from vllm_jdlora.demo.report import Answer, print_answers, print_curl
from vllm_jdlora.demo.requests import ChatRequest, read_requests
from vllm_jdlora.demo.server import Server, ServerFailed, free_port
from vllm_jdlora.demo.uncompressed import uncompressed_answers
from vllm_jdlora.errors import JDLoRAError

DATA = Path(__file__).resolve().parents[2] / "demo"
"""The repository's demo folder: adapters, requests and chat template."""

RANK, CLUSTERS = 32, 1
"""Measured on the eight adapters: relative errors 0.20 to 0.26 and 56 of 56 answers to held-out questions as
without compression; the paper's choice for so few, rank 16, has errors of 0.30 to 0.40 and changed 3 of 56."""

PREFERRED_PORT = 8000
KV_CACHE_BYTES = 256 << 20
MAX_MODEL_LEN = 1024
_STEPS = 6


def run_demo(
    console: Console,
    *,
    adapters_dir: Path | None = None,
    cache_dir: Path | None = None,
    port: int | None = None,
    stay: bool = False,
) -> list[Answer]:
    """Run all steps, print what they find, and return the answers.

    Args:
        console: where to print.
        adapters_dir: folder of PEFT folders for SmolLM2-135M-Instruct; the repository's eight if ``None``.
        cache_dir: see :func:`vllm_jdlora.cache.cache_root`.
        port: for the server; 8000, or a free one if that is taken, if ``None``.
        stay: keep the server up after the answers until Ctrl-C.

    Raises:
        JDLoRAError: what is missing or failed; of the server, :class:`vllm_jdlora.demo.server.ServerFailed`.
    """
    adapters_dir = (adapters_dir or DATA / "adapters").resolve()
    if not (DATA / "requests.json").is_file():
        raise JDLoRAError(f"{DATA} is missing: the demo runs from a clone of the repository, installed with -e")
    template = DATA / "chat_template.jinja"
    steps = Steps(console, _STEPS)
    with steps.step("Environment") as step:
        environment = check_environment()
        step.result = environment.summary
    with steps.step("Base model") as step:
        base = prepare_base_model(cache_dir, on_status=step.update)
        step.result = str(base)
    with steps.step("Compression") as step:
        collection = _up_to_date_collection(adapters_dir, base, cache_root(cache_dir) / "demo", step)
    requests = read_requests(DATA / "requests.json", _names(collection))
    with steps.step("Answers without compression (Hugging Face, PEFT)") as step:
        expected = uncompressed_answers(
            base, adapters_dir, requests, template, cache_root(cache_dir) / "demo" / "answers.json"
        )
        step.result = f"{len(expected)}"
    port = free_port(PREFERRED_PORT) if port is None else port
    server = Server(
        serve_arguments(base, collection, template, environment),
        port=port,
        log_path=cache_root(cache_dir) / "demo" / "server.log",
    )
    console.print(f"      [dim]{escape(shlex.join(server.command))}[/dim]", soft_wrap=True)
    try:
        with steps.step("Server start") as step:
            server.start(on_wait=functools.partial(_show_wait, step, server))
            step.result = f"{server.url}, log: {server.log_path}"
        with steps.step("Chat requests") as step, httpx.Client(base_url=server.url, timeout=120.0) as client:
            models = _model_names(client)
            served = [_ask(client, request) for request in requests]
            step.result = f"/v1/models lists {len(models)}: {', '.join(models)}"
        errors = {entry.name: entry.relative_error for entry in collection.manifest.adapters}
        answers = [
            Answer(request, got, without, errors.get(request.adapter or ""))
            for request, got, without in zip(requests, served, expected, strict=True)
        ]
        print_answers(console, answers)
        if stay:
            print_curl(console, server.url, requests[0])
            _wait_for_interrupt(server)
    finally:
        server.stop()
    return answers


def serve_arguments(base: Path, collection: Collection, template: Path, environment: Environment) -> list[str]:
    """What follows ``vllm serve``: the model, the collection, and limits that keep it small."""
    # Compiling the model takes a C++ compiler and a minute, at the first start: more than a few answers gain.
    eager = ["--enforce-eager"] if environment.device == "cpu" else []
    return [
        str(base),
        *eager,
        *("--served-model-name", MODEL_NAME),
        *("--lora-compression", "jd", "--lora-collection", str(collection.path)),
        *("--chat-template", str(template)),
        *("--dtype", environment.dtype),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--gpu-memory-utilization", "0.3"),
    ]


def _up_to_date_collection(adapters_dir: Path, base: Path, folder: Path, step: Step) -> Collection:
    """The collection of the adapters in ``folder``: the one that is there if it has the same content, else new."""
    adapters, _ = read_adapters([adapters_dir])
    target = folder / "collection"
    collection = _existing(target, adapters, base)
    how = "up to date"
    if collection is None:
        folder.mkdir(parents=True, exist_ok=True)
        collection = compress(
            adapters,
            target,
            rank=RANK,
            clusters=CLUSTERS,
            base_model=str(base),
            force=target.exists(),
            progress=lambda stage, done, total: step.update(f"{stage} {done}/{total}"),
        )
        how = f"rank {RANK}, {CLUSTERS} cluster"
    errors = [entry.relative_error for entry in collection.manifest.adapters]
    before, after = 2 * sum(a.parameters for a in adapters) / 1e6, collection.size_in_bytes() / 1e6
    step.result = (
        f"{len(adapters)} adapters, {before:.1f} MB → {after:.1f} MB, "
        f"relative errors {min(errors):.2f} to {max(errors):.2f} ({how}) in {target}"
    )
    return collection


def _existing(target: Path, adapters: list[Adapter], base: Path) -> Collection | None:
    if not target.exists():
        return None
    try:
        collection = Collection.open(target)
    except JDLoRAError:
        return None  # damaged, or of another format: it is only a cache
    manifest = collection.manifest
    # The demo sets no limit of error, so an adapter is plain only where it cannot be compressed.
    has = {(e.name, e.sha256) for e in manifest.adapters} | {(e.name, e.sha256) for e in manifest.plain}
    same = has == {(a.name, a.sha256) for a in adapters}
    same &= manifest.base_model.fingerprint == file_digest(base / "config.json")
    return collection if same and (manifest.rank, manifest.clusters) == (RANK, CLUSTERS) else None


def _names(collection: Collection) -> list[str]:
    manifest = collection.manifest
    return [a.name for a in manifest.adapters] + [p.name for p in manifest.plain]


def _show_wait(step: Step, server: Server, seconds: float) -> None:
    step.update(f"{seconds:.0f} s, log: {server.log_path}")


def _model_names(client: httpx.Client) -> list[str]:
    return [model["id"] for model in _checked(client.get("/v1/models"))["data"]]


def _ask(client: httpx.Client, request: ChatRequest) -> str:
    reply = _checked(client.post("/v1/chat/completions", json=request.body(MODEL_NAME)))
    return str(reply["choices"][0]["message"]["content"])


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise JDLoRAError(f"{response.request.url} answered {response.status_code}: {response.text[:300]}")
    return dict(response.json())


def _wait_for_interrupt(server: Server) -> None:
    """Return at Ctrl-C; raise if the server ends by itself."""
    try:
        while (code := server.exit_code()) is None:
            time.sleep(1)
    except KeyboardInterrupt:
        return
    raise ServerFailed(f"vllm serve ended with exit code {code}: see {server.log_path}", server.log_tail())
