"""The real server with one base slot: a step holds one cluster, and a rare one is not passed by others for ever."""

import asyncio
import time

import httpx
import pytest

from tests import tiny_models, tiny_tokenizer
from tests.serving.test_metrics_server import page
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.demo.server import Server

pytestmark = pytest.mark.server

AGE_CAP = 0.5
CLIENTS = 3
PATIENCE = 20 * AGE_CAP
"""Seconds until the clients of the common cluster give up: the rare one must not have waited for that."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("scarce")
    model = tiny_tokenizer.write_tokenizer(tiny_models.write_model(root / "model", "llama"), chat=False)
    folders = [tiny_models.write_adapter(root / f"a{seed}", model, seed) for seed in range(4)]
    path = compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=2, dtype="fp32").path
    by_cluster = {entry.cluster: entry.name for entry in Collection.open(path).manifest.adapters}
    assert len(by_cluster) == 2
    flags = [
        "--lora-compression=jd",
        f"--lora-collection={path}",
        "--jd-base-slots=1",
        f"--jd-age-cap={AGE_CAP}",
        "--jd-cluster-order=auto",
    ]
    engine = ["--dtype=float32", "--enforce-eager", "--max-model-len=192", "--max-num-seqs=8"]
    arguments = [str(model), *flags, *engine, "--kv-cache-memory-bytes=33554432"]
    with Server(arguments, log_path=root / "server.log") as server:
        yield server, list(by_cluster.values())


def test_a_rare_cluster_is_answered_while_the_common_one_is_asked_for_without_a_pause(served):
    server, (common, rare) = served

    async def run() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(name: str, tokens: int) -> None:
                body = {"model": name, "prompt": "Hello", "max_tokens": tokens, "ignore_eos": True}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text

            async def ask_on(until: asyncio.Event, tokens: int) -> None:
                begin = time.monotonic()
                while not until.is_set() and time.monotonic() - begin < PATIENCE:
                    await ask(common, tokens)

            await ask(rare, 1)  # both were asked for: slots are scarce from the next one on
            answered = asyncio.Event()
            # Answers of different lengths: some are always under way.
            clients = [asyncio.create_task(ask_on(answered, 90 + 30 * i)) for i in range(CLIENTS)]
            await asyncio.sleep(0.3)
            begin = time.monotonic()
            await ask(rare, 1)
            waited = time.monotonic() - begin
            answered.set()
            await asyncio.gather(*clients)
            return waited

    assert AGE_CAP / 2 < asyncio.run(run()) < PATIENCE / 2
    found = page(server.url)
    steps = {labels["le"]: count for labels, count in found["jdlora:clusters_per_step_bucket"]}
    assert steps["1.0"] == steps["+Inf"], "no step holds two clusters"
    [(_, swaps)] = found["jdlora:base_swaps_total"]
    assert 3 <= swaps <= 8, "a swap for each change of the cluster, not for each request"
