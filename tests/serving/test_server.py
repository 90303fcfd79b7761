"""The real `vllm serve --lora-compression jd` on a real model with real adapters, against HF with merged weights."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import reference
from tests.serving.conftest import COMPRESSED, DEMO, PLAIN, RUNTIME, SERVER_ARGS, adapter_folder

pytestmark = pytest.mark.server

MODELS = [*COMPRESSED, PLAIN, "base"]
TEXTS = {
    "fv_antonym": "Write the opposite of the word.\nhot",
    "ii_active_to_passive": "Rewrite the sentence in the passive voice.\nThe actor helped the judge.",
    "task363_sst2_polarity_classification": "Is the review positive or negative?\nA warm, funny and wise film.",
    "task379_agnews_topic_classification": "Which topic is it?\nStocks fell as oil prices rose again on Friday.",
    "task875_emotion_classification": "Which emotion is it?\ni feel so happy that you came back to me",
    PLAIN: "How similar are the sentences, from 0 to 5?\nA man is eating. A man eats food.",
    "base": "What is the capital of France?",
}
# fp32 on both sides through thirty layers; the bound, ten times what is usually seen.
TOLERANCE = 1e-3


@dataclass
class Answer:
    model: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


def chat_prompt(tokenizer, text: str) -> str:
    template = (DEMO / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, tokenize=False)


async def ask(client: httpx.AsyncClient, tokenizer, model: str, *, chat: bool, stream: bool) -> Answer:
    """One greedy request; tokens come back as ids so that nothing hides behind equal text."""
    body = {"model": model, "temperature": 0, "max_tokens": 12, "stream": stream, "return_tokens_as_token_ids": True}
    prompt = chat_prompt(tokenizer, TEXTS[model])
    if chat:
        body |= {"messages": [{"role": "user", "content": TEXTS[model]}], "logprobs": True, "top_logprobs": 1}
    else:
        body |= {"prompt": prompt, "logprobs": 1}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    chunks = []
    if stream:
        async with client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunks.append(json.loads(line[len("data: ") :]))
    else:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        chunks.append(response.json())
    tokens, logprobs = [], []
    for chunk in chunks:
        assert chunk["model"] == model
        for choice in chunk["choices"]:
            found = choice.get("logprobs")
            if not found:
                continue
            if chat:
                tokens += [c["token"] for c in found["content"]]
                logprobs += [c["logprob"] for c in found["content"]]
            else:
                tokens += found["tokens"]
                logprobs += found["token_logprobs"]
    ids = [int(t.removeprefix("token_id:")) for t in tokens]
    return Answer(model, tokenizer(prompt, add_special_tokens=False)["input_ids"], ids, logprobs)


def ask_all(url: str, tokenizer, requests: list[dict]) -> list[Answer]:
    """All requests at once, so that their tokens share batches."""

    async def run() -> list[Answer]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, tokenizer, **r) for r in requests))

    return asyncio.run(run())


def deltas_of(model: str, collection) -> dict:
    if model == "base":
        return {}
    if model in COMPRESSED:
        return reference.compressed_deltas(collection, model)
    return reference.plain_deltas(adapter_folder(model))


def check(answers: list[Answer], reference_model, collection) -> None:
    for model in {a.model for a in answers}:
        with reference.merged(reference_model, deltas_of(model, collection)) as merged:
            for answer in answers:
                if answer.model == model:
                    reference.check_greedy(merged, answer.prompt, answer.tokens, answer.logprobs, TOLERANCE)


def test_concurrent_requests_of_all_kinds_equal_merged_weights(jd_server, tokenizer, reference_model, collection):
    requests = [
        {"model": model, "chat": chat, "stream": stream}
        for model in MODELS
        for chat in (True, False)
        for stream in (True, False)
    ]
    answers = ask_all(jd_server.url, tokenizer, requests)
    check(answers, reference_model, collection)
    # The adapters matter: on its own prompt no compressed adapter answers as the base does.
    alone = ask_all(jd_server.url, tokenizer, [{"model": "base", "chat": False, "stream": False}])
    assert alone[0].tokens == next(a.tokens for a in answers if a.model == "base")


def test_an_exported_adapter_in_peft_gives_the_served_logprobs(jd_server, base_model, tokenizer, collection, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from vllm_jdlora.cli import main

    for name in COMPRESSED[:2]:
        folder = tmp_path / name
        assert main(["export", str(collection), name, "-o", str(folder)]) == 0
        served = ask_all(jd_server.url, tokenizer, [{"model": name, "chat": True, "stream": False}])[0]
        base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        reference.check_greedy(model, served.prompt, served.tokens, served.logprobs, TOLERANCE)


def test_the_adapters_change_what_the_base_says(jd_server, tokenizer):
    for model in COMPRESSED:
        body = {"prompt": chat_prompt(tokenizer, TEXTS[model]), "temperature": 0, "max_tokens": 8}
        texts = {
            name: httpx.post(f"{jd_server.url}/v1/completions", json={**body, "model": name}, timeout=60).json()
            for name in (model, "base")
        }
        assert texts[model]["choices"][0]["text"] != texts["base"]["choices"][0]["text"], model


def test_every_adapter_is_listed_and_an_unknown_one_is_404(jd_server):
    listed = httpx.get(f"{jd_server.url}/v1/models").json()["data"]
    assert sorted(m["id"] for m in listed) == sorted(MODELS)
    body = {"model": "no-such-adapter", "prompt": "hi", "max_tokens": 1}
    assert httpx.post(f"{jd_server.url}/v1/completions", json=body).status_code == 404


def call(server, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=120)


def answers_of(server, tokenizer, model: str, text: str) -> list[Answer]:
    TEXTS[model] = text
    return ask_all(server.url, tokenizer, [{"model": model, "chat": c, "stream": not c} for c in (True, False)])


def assert_unknown(server, model: str) -> None:
    assert call(server, "completions", model=model, prompt="hi", max_tokens=1).status_code == 404


@pytest.fixture(scope="module")
def mixture(collection, tmp_path_factory) -> Path:
    """A new adapter in the span of the collection's bases: parts of two that are in it."""
    from vllm_jdlora.cli import main

    root = tmp_path_factory.mktemp("mixture")
    for name in COMPRESSED[:2]:
        assert main(["export", str(collection), name, "-o", str(root / name)]) == 0
    one, other = (load_file(root / name / "adapter_model.safetensors") for name in COMPRESSED[:2])
    # Exported adapters are U Σ and V of one cluster: the sum of the products is the product with the sum.
    mixed = {key: 0.7 * t + 0.5 * other[key] if "lora_B" in key else t for key, t in one.items()}
    assert all(torch.equal(t, other[key]) for key, t in one.items() if "lora_A" in key)
    save_file(mixed, root / COMPRESSED[0] / "adapter_model.safetensors")
    return root / COMPRESSED[0]


def test_an_adapter_loaded_at_run_time_is_kept_uncompressed_if_bases_do_not_hold_it(
    jd_server, tokenizer, reference_model, collection
):
    loaded = call(jd_server, "load_lora_adapter", lora_name=RUNTIME, lora_path=str(adapter_folder(RUNTIME)))
    assert loaded.status_code == 200 and "kept uncompressed: relative error 0." in loaded.text, loaded.text
    TEXTS[RUNTIME] = "Which word comes first in the alphabet?\nriver, stone, apple, cloud, tree"
    try:
        requests = [{"model": m, "chat": False, "stream": False} for m in (RUNTIME, PLAIN, COMPRESSED[0], "base")]
        check(ask_all(jd_server.url, tokenizer, requests), reference_model, collection)
    finally:
        unloaded = call(jd_server, "unload_lora_adapter", lora_name=RUNTIME)
    assert unloaded.status_code == 200, unloaded.text
    assert_unknown(jd_server, RUNTIME)


def test_an_adapter_loaded_at_run_time_is_compressed_within_a_second_and_can_be_replaced(
    jd_server, tokenizer, reference_model, collection, mixture
):
    text = "Write the opposite of the word.\nslow"
    started = time.monotonic()
    loaded = call(jd_server, "load_lora_adapter", lora_name="mixed", lora_path=str(mixture))
    seconds = time.monotonic() - started
    assert loaded.status_code == 200 and "compressed into cluster 0 with relative error 0.0" in loaded.text, loaded.text
    try:
        answers = answers_of(jd_server, tokenizer, "mixed", text)
        with reference.merged(reference_model, reference.projected_deltas(collection, mixture, 0)) as merged:
            for a in answers:
                reference.check_greedy(merged, a.prompt, a.tokens, a.logprobs, TOLERANCE)
        again = call(jd_server, "load_lora_adapter", lora_name="mixed", lora_path=str(adapter_folder(RUNTIME)))
        assert again.status_code == 400
        body = {"lora_name": "mixed", "lora_path": str(adapter_folder(RUNTIME)), "load_inplace": True}
        assert "kept uncompressed" in call(jd_server, "load_lora_adapter", **body).text
        answers = answers_of(jd_server, tokenizer, "mixed", text)
        with reference.merged(reference_model, reference.plain_deltas(adapter_folder(RUNTIME))) as merged:
            for a in answers:
                reference.check_greedy(merged, a.prompt, a.tokens, a.logprobs, TOLERANCE)
    finally:
        assert call(jd_server, "unload_lora_adapter", lora_name="mixed").status_code == 200
    assert_unknown(jd_server, "mixed")
    assert seconds < 1, f"{seconds:.2f} s"


def test_what_cannot_be_loaded_at_run_time_is_a_bad_request(jd_server, tmp_path):
    for name, path in (("x", tmp_path), ("x", "/no/such/folder"), ("../x", adapter_folder(RUNTIME))):
        assert call(jd_server, "load_lora_adapter", lora_name=name, lora_path=str(path)).status_code == 400
    assert call(jd_server, "reload_lora_collection", lora_collection=str(tmp_path)).status_code == 400


@pytest.mark.parametrize("bases", ["the same bases", "other bases"])
def test_a_collection_is_swapped_under_traffic(
    jd_server, tokenizer, reference_model, collection, mixture, tmp_path, bases
):
    from vllm_jdlora.cli import main

    second = tmp_path / "second"
    if bases == "the same bases":
        shutil.copytree(collection, second)
        shutil.copytree(mixture, tmp_path / "mixed")
        assert main(["add", str(second), str(tmp_path / "mixed")]) == 0
    else:
        folders = [str(adapter_folder(name)) for name in COMPRESSED]
        assert main(["compress", *folders, "-o", str(second), "--rank", "48", "--clusters", "1"]) == 0
    requests = [{"model": m, "chat": c, "stream": True} for m in MODELS for c in (True, False)]

    async def swap_in_traffic(path: Path) -> tuple[list[Answer], dict]:
        async with httpx.AsyncClient(base_url=jd_server.url, timeout=120) as client:
            asked = [asyncio.create_task(ask(client, tokenizer, **r)) for r in requests]
            await asyncio.sleep(0.3)
            swapped = await client.post("/v1/reload_lora_collection", json={"lora_collection": str(path)})
            assert swapped.status_code == 200, swapped.text
            return await asyncio.gather(*asked), swapped.json()

    try:
        _, swapped = asyncio.run(swap_in_traffic(second))
        same = bases == "the same bases"
        expected = {"same_bases": same, "added": int(same), "removed": 0, "changed": 0 if same else len(COMPRESSED)}
        assert swapped == swapped | expected
        names = [*MODELS, "mixed"] if same else MODELS
        listed = httpx.get(f"{jd_server.url}/v1/models").json()["data"]
        assert sorted(m["id"] for m in listed) == sorted(names)
        check(ask_all(jd_server.url, tokenizer, requests), reference_model, second)
        if same:
            answers = answers_of(jd_server, tokenizer, "mixed", "Write the opposite of the word.\nslow")
            with reference.merged(reference_model, reference.compressed_deltas(second, "mixed")) as merged:
                for a in answers:
                    reference.check_greedy(merged, a.prompt, a.tokens, a.logprobs, TOLERANCE)
    finally:
        answers, _ = asyncio.run(swap_in_traffic(collection))
    for one in answers:  # of one revision or the other, and of no mixture
        found = []
        for path in (collection, second):
            with reference.merged(reference_model, deltas_of(one.model, path)) as merged:
                found.append(matches(merged, one))
        assert any(found), one
    check(ask_all(jd_server.url, tokenizer, requests), reference_model, collection)


def matches(model, answer: Answer) -> bool:
    try:
        reference.check_greedy(model, answer.prompt, answer.tokens, answer.logprobs, TOLERANCE)
    except AssertionError:
        return False
    return True


def test_the_base_answers_as_a_server_without_lora(jd_server, base_model, tokenizer, tmp_path):
    from vllm_jdlora.demo.server import Server

    requests = [{"model": "base", "chat": chat, "stream": False} for chat in (True, False)]
    crowd = [{"model": m, "chat": False, "stream": False} for m in COMPRESSED]
    ours = ask_all(jd_server.url, tokenizer, requests + crowd)[: len(requests)]
    with Server([str(base_model), *SERVER_ARGS], log_path=tmp_path / "base.log") as server:
        stock = ask_all(server.url, tokenizer, requests)
    for one, other in zip(ours, stock, strict=True):
        assert one.tokens == other.tokens
        assert max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)) <= TOLERANCE
