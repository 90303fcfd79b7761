"""The real server's /metrics with compressed adapters: what routers and dashboards find there after requests."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import COMPRESSED, PLAIN
from vllm_jdlora.collection import Collection
from vllm_jdlora.serving.metrics import GAUGES, WAITING_REASONS

pytestmark = pytest.mark.server


def page(url: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def ask(url: str, models: list[str], max_tokens: int = 8) -> None:
    async def run() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            bodies = [{"model": m, "prompt": "Hello", "max_tokens": max_tokens, "ignore_eos": True} for m in models]
            for answer in await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies)):
                assert answer.status_code == 200, answer.text

    asyncio.run(run())


def test_counts_of_the_engine_are_on_the_page(jd_server, collection):
    ask(jd_server.url, [*COMPRESSED, PLAIN, "base"])
    ask(jd_server.url, [COMPRESSED[0]])
    found = page(jd_server.url)
    values = {name: series[0][1] for name, series in found.items() if len(series) == 1}
    assert {metric for metric, _ in GAUGES.values()} <= set(values)
    assert values["jdlora:adapters_resident"] >= len(COMPRESSED)
    assert values["jdlora:clusters"] == values["jdlora:bases_resident"] == 1
    assert values["jdlora:plain_adapters"] >= 1
    assert values["jdlora:adapters_in_step"] == 1, "the last step held one"
    assert values["jdlora:clusters_per_step_sum"] <= values["jdlora:clusters_per_step_count"]
    assert values["jdlora:clusters_per_step_count"] >= 8
    # Each scaling matrix was copied in once, all of one size.
    swaps, size = values["jdlora:sigma_swaps_total"], values["jdlora:sigma_swap_bytes_total"]
    assert swaps >= len(COMPRESSED) and size % swaps == 0 and size > 0
    known = {labels["kind"]: value for labels, value in found["jdlora:adapters_known"]}
    assert known == {"compressed": len(COMPRESSED), "plain": 1}
    [(labels, value)] = found["jdlora:collection_info"]
    assert value == 1 and labels["revision"] == Collection.open(collection).manifest.revision
    waiting = {labels["reason"]: value for labels, value in found["jdlora:waiting_requests"]}
    assert waiting == dict.fromkeys(WAITING_REASONS, 0)


def test_a_router_sees_who_runs_and_the_page_does_not_grow(jd_server):
    sizes, seen = set(), set()
    for models in (COMPRESSED[:2], COMPRESSED[2:4], [COMPRESSED[4], PLAIN], [*COMPRESSED, PLAIN]):
        ask(jd_server.url, models)
        found = page(jd_server.url)
        [(labels, _)] = found["vllm:lora_requests_info"]
        seen.add(labels["running_lora_adapters"])
        sizes.add(sum(len(series) for name, series in found.items() if name.startswith(("vllm:", "jdlora:"))))
    assert len(sizes) == 1
    assert seen == {""}, "nobody runs between the rounds"

    async def look_while_they_run() -> str:
        async with httpx.AsyncClient(base_url=jd_server.url, timeout=120) as client:
            body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
            asked = [asyncio.create_task(client.post("/v1/completions", json={**body, "model": m})) for m in COMPRESSED]
            running = ""
            while not all(task.done() for task in asked) and running.count(",") < len(COMPRESSED) - 1:
                [(labels, _)] = await asyncio.to_thread(lambda: page(jd_server.url)["vllm:lora_requests_info"])
                running = labels["running_lora_adapters"]
            await asyncio.gather(*asked)
            return running

    assert sorted(asyncio.run(look_while_they_run()).split(",")) == sorted(COMPRESSED)


def test_an_idle_server_names_the_revision_that_it_was_told_to_serve(jd_server, collection, tmp_path):
    from vllm_jdlora.cli import main

    fewer = tmp_path / "fewer"
    shutil.copytree(collection, fewer)
    assert main(["remove", str(fewer), COMPRESSED[-1]]) == 0

    def reload(path: Path) -> None:
        body = {"lora_collection": str(path)}
        answer = httpx.post(f"{jd_server.url}/v1/reload_lora_collection", json=body, timeout=60)
        assert answer.status_code == 200, answer.text

    try:
        for path in (fewer, collection, fewer):
            reload(path)
            [(labels, _)] = page(jd_server.url)["jdlora:collection_info"]
            assert labels["revision"] == Collection.open(path).manifest.revision, "nothing was asked since"
    finally:
        reload(collection)


def test_the_log_says_what_is_served_and_what_moved(jd_server, collection):
    ask(jd_server.url, COMPRESSED)
    log = jd_server.log_path.read_text()
    [serving] = [line for line in log.splitlines() if "jdlora event=serving" in line]
    assert f"collection={collection}" in serving and "scaling_slots=5 plain_slots=2" in serving
    assert "jdlora event=swaps engine=0 sigma_swaps=" in log
