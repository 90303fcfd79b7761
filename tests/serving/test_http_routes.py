"""The routes of an API server: the list of models as vLLM gives it, and nothing without the key."""

import asyncio
import dataclasses
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.serve.lora.api_router import attach_router as attach_lora
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.lora.request import LoRARequest

from tests.collection.families import write_member
from tests.serving.fake_engine import FakeServer
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_names import AdapterNames, enter_collection
from vllm_jdlora.serving.http_routes import AdapterRoutes
from vllm_jdlora.serving.model_list import ModelList

NAMES = ["a", "m1", 'ä "quoted" {0}']


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    root = tmp_path_factory.mktemp("routes")
    adapters = [read_adapter(write_member(root / f"m{i}", 0, i), name) for i, name in enumerate(NAMES)]
    compress(adapters, root / "c", rank=6, clusters=1, dtype="fp32", max_error=0.5)
    return add(root / "c", [read_adapter(write_member(root / "odd", 5, 9))]).collection


@pytest.fixture
def app(collection, tmp_path, monkeypatch):
    """vLLM's own routes and its guard, in the order in which vLLM puts them together, and our middleware."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = FastAPI()
    attach_lora(app)
    attach_models(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    app.add_middleware(AdapterRoutes)
    server = FakeServer(collection, tmp_path)
    server.models.__dict__.pop("load_lora_adapter", None)  # the middleware's part
    app.state.openai_serving_models = server.models
    app.state.args = SimpleNamespace(jd_adapter_dir=None)
    return app


KEY = {"Authorization": "Bearer secret"}


def without_chance(card):
    """What differs from call to call: the time, and the permission's random name."""
    return {
        **card,
        "created": 0,
        "permission": [{**p, "id": "", "created": 0} for p in card["permission"]],
    }


def test_the_list_is_the_one_that_vllm_makes(app):
    models = app.state.openai_serving_models
    expected = asyncio.run(models.show_available_models()).model_dump()
    with TestClient(app, headers=KEY) as client:
        response = client.get("/v1/models")
        assert response.headers["content-type"] == "application/json"
        assert int(response.headers["content-length"]) == len(response.content)
        listed = response.json()
        assert [m["id"] for m in listed["data"]] == ["base", *NAMES, "odd"]
        assert [*map(without_chance, listed["data"])] == [*map(without_chance, expected["data"])]
        assert listed.keys() == expected.keys()
        for card in listed["data"]:
            assert without_chance(client.get(f"/v1/models/{card['id']}").json()) == without_chance(card)
        assert client.get("/v1/models/unknown").status_code == 404


def test_pages_together_are_the_list(app):
    with TestClient(app, headers=KEY) as client:
        seen, after = [], {}
        while True:
            page = client.get("/v1/models", params={"limit": 2, **after}).json()
            seen += [m["id"] for m in page["data"]]
            if not page["has_more"]:
                break
            assert page["last_id"] == seen[-1]
            after = {"after": page["last_id"]}
        assert seen == ["base", *NAMES, "odd"]
        assert client.get("/v1/models", params={"after": "unknown"}).status_code == 404
        assert client.get("/v1/models", params={"limit": 0}).status_code == 422
        assert client.get("/v1/models", params={"after": "odd"}).json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/a"),
        ("GET", "/v1/models?limit=1"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/reload_lora_collection"),
    ],
)
def test_nothing_is_answered_without_the_key(app, method, path):
    with TestClient(app) as client:
        assert client.request(method, path, json={}).status_code == 401
        assert client.request(method, path, json={}, headers=KEY).status_code != 401


def test_loading_at_run_time_answers_where_the_adapter_went(app, tmp_path):
    near = write_member(tmp_path / "near", 0, 55)
    with TestClient(app, headers=KEY) as client:
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(near)})
        assert loaded.status_code == 200 and "compressed into cluster 0" in loaded.text
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", *NAMES, "odd", "new"]
        again = client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(near)})
        assert again.status_code == 400 and "already been loaded" in again.text
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 200
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["base", *NAMES, "odd"]
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404


def test_a_reload_without_a_change_says_so(app, collection):
    with TestClient(app, headers=KEY) as client:
        answer = client.post("/v1/reload_lora_collection", json={}).json()
        assert answer["revision"] == collection.manifest.revision
        assert (answer["added"], answer["removed"], answer["changed"]) == (0, 0, 0)
        assert client.post("/v1/reload_lora_collection", json={"lora_collection": "/none"}).status_code == 400
        assert client.post("/v1/reload_lora_collection", json={"folder": "x"}).status_code == 422
        # Not as a form: a browser sends those to other sites without asking.
        assert client.post("/v1/reload_lora_collection", data={"lora_collection": "x"}).status_code in (415, 422)


def test_without_runtime_updates_only_the_models_are_ours(app, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0")
    with TestClient(app, headers=KEY) as client:
        assert client.post("/v1/reload_lora_collection", json={}).status_code in (404, 405)
        assert len(client.get("/v1/models").json()["data"]) == 5


def test_a_server_whose_routes_cannot_be_set_up_does_not_start(app):
    app.state.openai_serving_models.lora_requests = {}
    sent = []

    async def start():
        async def send(message):
            sent.append(message["type"])

        async def receive():
            return {"type": "lifespan.startup"}

        await app({"type": "lifespan", "app": app, "state": {}}, receive, send)

    asyncio.run(start())
    assert sent == ["lifespan.startup.failed"]


def test_a_card_is_made_once_and_a_change_makes_one_block_anew(collection, tmp_path):
    server = FakeServer(collection, tmp_path)
    server.names.become({f"n{i}": LoRARequest(f"n{i}", i + 1, f"jd://r:0#n{i}") for i in range(2000)})
    listed = ModelList(server.models)
    made = []
    card = listed._template.card
    listed._template.card = lambda request: made.append(request.lora_name) or card(request)

    async def names_now():
        _, pieces = await listed.whole()
        body = b"".join([piece async for piece in pieces])
        return body, len(made)

    async def check():
        for _ in range(2):
            assert (await names_now())[1] == 2000
        del server.names["n700"]
        _, count = await names_now()
        assert count <= 2000 + 256
        server.names["n700"] = LoRARequest("n700", 5000, "jd://r:0#n700")
        body, later = await names_now()
        assert later <= count + 256 and b'"n700"' in body

    asyncio.run(check())


def test_adapters_of_the_collection_are_entered_without_a_call_to_the_engine(collection, tmp_path):
    server = FakeServer(collection, tmp_path)
    assert [(n, r.lora_int_id) for n, r in server.names.items()] == [(n, i + 1) for i, n in enumerate([*NAMES, "odd"])]
    assert not server.engine.calls and server.models.lora_id_counter.inc(1) == 5


def test_the_base_models_name_is_not_an_adapters(collection, tmp_path):
    server = FakeServer(collection, tmp_path)
    server.models.base_model_paths = [dataclasses.replace(server.models.base_model_paths[0], name="m1")]
    with pytest.raises(JDLoRAError, match="--served-model-name"):
        enter_collection(server.models)


def test_a_collection_that_was_replaced_while_the_server_started_is_refused(collection, tmp_path):
    server = FakeServer(collection, tmp_path)
    server.engine.vllm_config.additional_config["jdlora"]["revision"] = "0"
    with pytest.raises(JDLoRAError, match="start it again"):
        enter_collection(server.models)


def test_a_request_to_the_base_model_does_not_look_through_all_names(collection, tmp_path):
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from vllm_jdlora.serving.api_server import wrap_api_server

    class Counted(AdapterNames):
        def values(self):
            raise AssertionError("looked through all names")

    server = FakeServer(collection, tmp_path)
    server.models.lora_requests = Counted({**server.names, "image": LoRARequest("image", 9, "/x")})
    wrap_api_server()
    serving = BaseServing(server.models, server.engine.model_config)
    message = [{"content": [{"type": "text", "text": "hi"}]}]
    request = SimpleNamespace(model="base", messages=message)
    assert serving._maybe_get_adapters(request, supports_default_mm_loras=True) is None
    message[0]["content"].append({"type": "image_url", "image_url": "x"})
    assert serving._maybe_get_adapters(request, supports_default_mm_loras=True).lora_name == "image"
