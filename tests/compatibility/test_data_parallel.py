"""Two data-parallel engines behind one server give the answers of one: those of merged weights."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from tests import reference, tiny_models, tiny_tokenizer
from tests.compatibility.test_architectures import COMPRESSED, PLAIN, TOLERANCE, deltas, write_files

pytestmark = pytest.mark.server

WHO = [*COMPRESSED, PLAIN, None] * 4
PROMPTS = [[(7 * i + 3 * j) % 250 + 2 for j in range(6 + 3 * i)] for i in range(len(WHO))]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    files = write_files(tmp_path_factory.mktemp("data-parallel"), "llama")
    tiny_tokenizer.write_tokenizer(Path(files["model"]))
    return files


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    from vllm_jdlora.demo.server import Server

    args = [
        files["model"],
        "--served-model-name=base",
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=192",
        "--max-num-seqs=16",
        "--kv-cache-memory-bytes=33554432",
        "--lora-compression=jd",
        f"--lora-collection={files['collection']}",
        "--lora-modules",
        f"{PLAIN}={files['plain'][PLAIN]}",
        "--data-parallel-size=2",
    ]
    # Two workers on a machine of two cores: one thread each, wherever there is room.
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with Server(args, env=env, log_path=tmp_path_factory.mktemp("logs") / "dp.log") as running:
        yield running


def ask_all(url: str) -> list[dict]:
    """One greedy request for each of WHO, all at once."""

    async def ask(client: httpx.AsyncClient, name: str | None, prompt: list[int]) -> dict:
        body = {"model": name or "base", "prompt": prompt, "temperature": 0, "max_tokens": 8, "logprobs": 1}
        more = {"return_tokens_as_token_ids": True, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body | more)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["logprobs"]

    async def run() -> list[dict]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, *each) for each in zip(WHO, PROMPTS, strict=True)))

    return asyncio.run(run())


def test_both_engines_answer_and_every_answer_equals_merged_weights(server, files):
    answers = ask_all(server.url)
    model = tiny_models.read_model(files["model"])
    for name, prompt, answer in zip(WHO, PROMPTS, answers, strict=True):
        tokens = [int(token.removeprefix("token_id:")) for token in answer["tokens"]]
        with reference.merged(model, deltas(files, name)) as merged:
            reference.check_greedy(merged, prompt, tokens, answer["token_logprobs"], TOLERANCE)
    counted = httpx.get(f"{server.url}/metrics").text
    finished = re.findall(
        r'^vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)$', counted, re.M
    )
    assert {engine for engine, count in finished if float(count) > 0} == {"0", "1"}
