"""Two API server processes in front of one engine: they know the same adapters by the same ids."""

import asyncio

import httpx
import pytest
import torch

from tests import reference, tiny_llama, tiny_tokenizer
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.demo.server import Server

pytestmark = pytest.mark.server

NAMES = [f"a{i:02d}" for i in range(12)]
KEY = {"Authorization": "Bearer secret"}
PROMPT = [5, 9, 30, 77, 4, 200, 13]
# fp32 on both sides.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    folders = [tiny_llama.write_adapter(root / name, i, targets=["q_proj", "v_proj"]) for i, name in enumerate(NAMES)]
    plain = tiny_llama.write_adapter(root / "given", 99, targets=["q_proj", "v_proj"])
    compress([read_adapter(f) for f in folders], root / "collection", rank=8, clusters=2, dtype="fp32")
    model = tiny_tokenizer.write_tokenizer(tiny_llama.write_model(root / "model"))
    return {"model": model, "collection": root / "collection", "plain": plain}


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    args = [
        *(str(files["model"]), "--served-model-name=base", "--dtype=float32", "--enforce-eager"),
        *("--max-model-len=64", "--kv-cache-memory-bytes=33554432", "--api-server-count=2", "--api-key=secret"),
        *(
            "--lora-compression=jd",
            f"--lora-collection={files['collection']}",
            f"--lora-modules=given={files['plain']}",
        ),
    ]
    log = tmp_path_factory.mktemp("logs") / "two.log"
    with Server(args, log_path=log) as running:
        yield running


def test_every_process_answers_for_every_adapter(server, files):
    from transformers import AutoModelForCausalLM

    async def ask(name: str) -> dict:
        # A connection of its own: which process takes it is not for the client to say.
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, headers={"Authorization": "Bearer secret"}
        ) as one:
            listed = (await one.get("/v1/models")).json()["data"]
            assert [m["id"] for m in listed] == ["base", *NAMES, "given"]
            body = {"model": name, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
            response = await one.post("/v1/completions", json=body | {"return_tokens_as_token_ids": True})
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["logprobs"]

    async def ask_all(names: list[str]) -> list[dict]:
        return await asyncio.gather(*map(ask, names))

    asked = [*NAMES, "given", "base"] * 3
    answers = asyncio.run(ask_all(asked))
    log = server.log_path.read_text()
    assert all(f"ApiServer_{i}" in log for i in range(2)) and log.count("12 adapters of") == 2
    model = AutoModelForCausalLM.from_pretrained(files["model"], dtype=torch.float32).eval()
    for name in set(asked):
        deltas = {"base": {}, "given": reference.plain_deltas(files["plain"])}.get(name)
        if deltas is None:
            deltas = reference.compressed_deltas(files["collection"], name)
        with reference.merged(model, deltas) as merged:
            for answer in [a for n, a in zip(asked, answers, strict=True) if n == name]:
                tokens = [int(t.removeprefix("token_id:")) for t in answer["tokens"]]
                reference.check_greedy(merged, PROMPT, tokens, answer["token_logprobs"], TOLERANCE)


def test_nothing_is_told_without_the_key(server):
    for path in ("/v1/models", "/v1/models/a00"):
        assert httpx.get(server.url + path).status_code == 401
