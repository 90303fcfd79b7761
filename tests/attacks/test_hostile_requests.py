"""Requests that mean harm: nothing but PEFT folders is read, nothing is written outside the server's own folder, and
every answer is one of a client's errors."""

from __future__ import annotations

import json
import os
import shutil
import time
from types import SimpleNamespace
from urllib.parse import quote

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.lora.api_router import attach_router as attach_lora

from tests.collection.families import write_member
from tests.serving.fake_engine import FakeServer
from vllm_jdlora.adapter import WEIGHTS_FILE, read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.peft_config import CONFIG_FILE
from vllm_jdlora.serving.http_routes import AdapterRoutes

NAMES = ["m0", "m1", "m2"]


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    root = tmp_path_factory.mktemp("requests")
    adapters = [read_adapter(write_member(root / name, 0, i)) for i, name in enumerate(NAMES)]
    return compress(adapters, root / "c", rank=6, clusters=1, dtype="fp32", max_error=0.5)


@pytest.fixture(scope="module")
def world(collection, tmp_path_factory):
    """A server with vLLM's own routes, its folder of adapters, a good adapter outside, and a secret."""
    root = tmp_path_factory.mktemp("world")
    for name in ("arrivals", "shelf"):
        (root / name).mkdir()
    (root / "secret.json").write_text('{"password": "hunter2"}')
    write_member(root / "outside", 0, 7)
    environment = pytest.MonkeyPatch()
    environment.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    environment.setenv("HF_HUB_OFFLINE", "1")
    app = FastAPI()
    attach_lora(app)
    attach_models(app)
    init_exception_handler(app)
    app.add_middleware(AdapterRoutes)
    server = FakeServer(collection, root / "arrivals")
    app.state.openai_serving_models = server.models
    app.state.args = SimpleNamespace(jd_adapter_dir=str(root / "shelf"), log_error_stack=False)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield SimpleNamespace(root=root, client=client, server=server, shelf=root / "shelf", good=root / "outside")
    environment.undo()


def everything_in(root) -> dict[str, float]:
    return {str(p.relative_to(root)): p.lstat().st_mtime_ns for p in root.rglob("*") if p.name != "adapters"}


def load(world, **body):
    return world.client.post("/v1/load_lora_adapter", json=body)


NAUGHTY_NAMES = {
    "up": "../m9",
    "far up": "../../../../../../etc/passwd",
    "root": "/etc/passwd",
    "windows": "..\\m9",
    "NUL": "m9\0",
    "NUL inside": "m\x009",
    "newline": "m9\nINFO: adapter m0 removed",
    "terminal": "m9\x1b[2J",
    "blank": " ",
    "hidden": ".m9",
    "long": "m" * 100_000,
    "long in bytes": "感" * 100,
    "right to left": "m9\u202egnp",
    "no width": "m\u200b9",
    "line separator": "m9\u2028x",
    "not a character": "m9\uffff",
    "a collection's own path": "jd://0123:0#m0/..",
}


@pytest.mark.parametrize("what", NAUGHTY_NAMES)
def test_a_name_that_is_more_than_a_name_is_refused(world, what):
    before, names = everything_in(world.root), dict(world.server.names)
    answer = load(world, lora_name=NAUGHTY_NAMES[what], lora_path=str(world.good))
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 2000 and "\x1b" not in answer.text
    assert world.client.post("/v1/unload_lora_adapter", json={"lora_name": NAUGHTY_NAMES[what]}).status_code == 404
    assert everything_in(world.root) == before and dict(world.server.names) == names


@pytest.mark.parametrize("look_alike", ["m\u030a0", "ｍ0", "m０", "М0", "m0\u0301", "M0", "ḿ0"])
def test_a_name_that_looks_like_another_is_another(world, look_alike):
    """Unicode has many ways to write what looks the same; names are compared to the letter and never folded."""
    before = world.server.names["m0"]
    answer = load(world, lora_name=look_alike, lora_path=str(world.good))
    assert answer.status_code == 200, answer.text
    try:
        assert world.server.names["m0"] is before and world.server.names[look_alike] is not before
        assert world.client.get(f"/v1/models/{look_alike}").json()["id"] == look_alike
    finally:
        assert world.client.post("/v1/unload_lora_adapter", json={"lora_name": look_alike}).status_code == 200
    assert world.client.get("/v1/models/m0").json()["id"] == "m0"


PATHS = {
    "a secret": "{root}/secret.json",
    "by way of another folder": "{root}/shelf/../secret.json",
    "the shelf itself": "{root}/shelf",
    "far up": "../../../../../../../../etc",
    "a device": "/dev/zero",
    "the process itself": "/proc/self",
    "NUL": "{root}/outside\0",
    "a name without end": "/" + "x" * 100_000,
    "a home that is none": "~nobody-of-that-name/x",
    "a path of ours": "jd://0123456789abcdef:0#m0",
    "a URL": "http://169.254.169.254/latest/meta-data",
    "a file URL": "file://{root}/outside",
    "blanks": "   ",
}


@pytest.mark.parametrize("what", PATHS)
def test_a_path_to_what_is_no_adapter_gives_nothing_away(world, what):
    before = everything_in(world.root)
    for route, body in (("load_lora_adapter", {"lora_name": "x"}), ("reload_lora_collection", {})):
        field = "lora_path" if body else "lora_collection"
        path = PATHS[what].format(root=world.root)
        answer = world.client.post(f"/v1/{route}", json={**body, field: path})
        assert answer.status_code == 400, (route, answer.text)
        assert "hunter2" not in answer.text and "root:" not in answer.text
    assert everything_in(world.root) == before and "x" not in world.server.names


def test_links_and_pipes_in_the_folder_of_adapters_are_not_followed_nor_waited_for(world):
    good, shelf, before = world.good, world.shelf, world.server.files()
    (shelf / "link").symlink_to(good)
    (shelf / "loop").symlink_to(shelf / "loop")
    for name, file in (("half", WEIGHTS_FILE), ("other-half", CONFIG_FILE)):
        shutil.copytree(good, shelf / name)
        (shelf / name / file).unlink()
        (shelf / name / file).symlink_to(good / file)
    shutil.copytree(good, shelf / "secret")
    (shelf / "secret" / CONFIG_FILE).unlink()
    (shelf / "secret" / CONFIG_FILE).symlink_to(world.root / "secret.json")
    for name, file in (("pipe", CONFIG_FILE), ("pipe-of-weights", WEIGHTS_FILE)):
        shutil.copytree(good, shelf / name)
        (shelf / name / file).unlink()
        os.mkfifo(shelf / name / file)
    started = time.monotonic()
    resolve = world.client.portal.call
    for name in ("link", "loop", "half", "other-half", "secret", "pipe", "pipe-of-weights", "../outside"):
        answer = resolve(world.server.models.resolve_lora, name)
        assert answer.error.code in (400, 404), name
        assert "hunter2" not in answer.error.message and name not in world.server.names
    # Named outright as well: a pipe has no end.
    for name in ("pipe", "pipe-of-weights"):
        assert load(world, lora_name="x", lora_path=str(shelf / name)).status_code == 400
    assert time.monotonic() - started < 20
    assert world.server.files() <= before


BODIES = {
    "no JSON": b"{",
    "nothing": b"",
    "a list": b"[]",
    "a deep nest": b'{"lora_name":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of 5,000 digits": b'{"lora_name": ' + b"9" * 5000 + b"}",
    "NaN": b'{"lora_name": NaN, "lora_path": NaN}',
    "numbers": b'{"lora_name": 1, "lora_path": 2}',
    "half a surrogate pair": b'{"lora_name": "\\ud800", "lora_path": "\\udfff"}',
    "half a pair in the path": b'{"lora_name": "x", "lora_path": "/\\udfff", "lora_collection": "/\\udfff"}',
    "objects": b'{"lora_name": {"x": 1}, "lora_path": {}, "lora_collection": {}}',
    "no UTF-8": b'{"lora_name": "\xff\xfe", "lora_path": "\xff"}',
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_of_another_form_is_a_clients_error(world, what):
    for route in ("load_lora_adapter", "unload_lora_adapter", "reload_lora_collection"):
        answer = world.client.post(f"/v1/{route}", content=BODIES[what], headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (route, answer.status_code, answer.text)
        assert "Traceback" not in answer.text
    assert world.client.get("/v1/models").status_code == 200


def test_a_config_whose_patterns_take_for_ever_does_not_stop_the_server(world, tmp_path):
    folder = shutil.copytree(world.good, tmp_path / "slow")
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"rank_pattern": {"([a-z_.0-9]+)+!": 4}}))
    started = time.monotonic()
    answer = load(world, lora_name="x", lora_path=str(folder))
    assert answer.status_code == 400 and "may take for ever" in answer.text
    assert time.monotonic() - started < 5


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(max_size=20), st.text(max_size=40), st.booleans())
def test_any_name_and_any_path_get_an_answer(world, name, path, load_inplace):
    def sendable(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    before = everything_in(world.root)
    answer = load(world, lora_name=sendable(name), lora_path=sendable(path), load_inplace=load_inplace)
    assert answer.status_code in (400, 422)
    shown = world.client.get(f"/v1/models/{quote(sendable(name), safe='')}")
    assert shown.status_code in (200, 307, 404)
    assert everything_in(world.root) == before
