"""Adapters that come and go in a running API server: what is served meanwhile, what is left, and what is refused."""

import asyncio
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.exceptions import VLLMNotFoundError
from vllm.lora.request import LoRARequest

from tests.collection.families import write_member
from tests.serving.fake_engine import GRACE, FakeServer, content_of
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection.build import compress
from vllm_jdlora.serving import runtime_adapters
from vllm_jdlora.serving.adapter_copies import AdapterCopies
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.placement import place


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two families of three adapters in two clusters, newcomers of the families, and a stranger."""
    root = tmp_path_factory.mktemp("runtime")
    known = [read_adapter(write_member(root / f"f{f}m{i}", f, 10 * f + i)) for f in range(2) for i in range(3)]
    collection = compress(known, root / "collection", rank=6, clusters=2, dtype="fp32", max_error=0.3)
    return {
        "collection": collection,
        "near": write_member(root / "near", 0, 77),
        "other": write_member(root / "other", 1, 78),
        "stranger": write_member(root / "stranger", 9, 79),
    }


@pytest.fixture
def serve(files, tmp_path):
    def make(**options):
        (tmp_path / "arrivals").mkdir(exist_ok=True)
        return FakeServer(files["collection"], tmp_path / "arrivals", **options)

    return make


async def load(server, name, folder, **options):
    return await server.models.load_lora_adapter(
        LoadLoRAAdapterRequest(lora_name=name, lora_path=str(folder), **options)
    )


async def unload(server, name):
    return await server.models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))


def run(coroutine_function):
    """A test as a coroutine, which must not hang."""

    def test(*args, **kwargs):
        asyncio.run(asyncio.wait_for(coroutine_function(*args, **kwargs), 30))

    test.__name__, test.__wrapped__ = coroutine_function.__name__, coroutine_function
    return test


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


@run
async def test_an_adapter_of_a_known_family_is_compressed_into_its_cluster(serve, files):
    server = serve()
    text = await load(server, "new", files["near"])
    path = AdapterPath.parse(server.names["new"].lora_path)
    family = files["collection"].manifest.adapters[files["collection"].index_of("f0m0")].cluster
    assert path.cluster == family and path.arrival and path.revision == files["collection"].manifest.revision
    assert f"'new' added: compressed into cluster {family} with relative error 0.1" in text and "(limit 0.3)" in text
    assert server.names["new"].lora_int_id not in {server.names[f"f0m{i}"].lora_int_id for i in range(3)}
    assert await server.ask("new") not in {content_of(files["collection"], f"f0m{i}") for i in range(3)}


@run
async def test_a_stranger_is_kept_as_it_is_and_outlives_its_folder(serve, files, tmp_path):
    server = serve()
    folder = shutil.copytree(files["stranger"], tmp_path / "stranger")
    text = await load(server, "odd", folder)
    assert "'odd' added: kept uncompressed: relative error 0." in text and "is over the limit" in text
    shutil.rmtree(folder)
    assert await server.ask("odd") == read_adapter(files["stranger"]).sha256


@run
async def test_a_file_of_the_arrivals_folder_goes_with_its_last_user(serve, files):
    server = serve()
    await load(server, "one", files["near"])
    await load(server, "two", files["stranger"])
    await load(server, "three", files["stranger"])
    assert len(server.files()) == 3  # a copy of each content, and one Σ
    await unload(server, "one")
    await unload(server, "two")
    await until(lambda: len(server.engine.removed) == 2)
    assert server.files() == {f"adapters/{read_adapter(files['stranger']).sha256}"}
    assert await server.ask("three") == read_adapter(files["stranger"]).sha256
    await unload(server, "three")
    await until(lambda: not server.files())
    assert not server.engine.known


@pytest.mark.parametrize(("kind", "again"), [("near", "other name"), ("near", "one"), ("stranger", "other name")])
def test_an_adapter_may_be_loaded_while_the_last_one_of_the_same_content_is_forgotten(
    serve, files, monkeypatch, kind, again
):
    """Its copy is found in the arrivals folder, and the copy's last user leaves before the newcomer has used it."""

    @run
    async def check():
        server = serve()
        await load(server, "one", files[kind])
        answer = await server.ask("one")
        await unload(server, "one")
        waited = []

        def place_late(collection, adapter, limit):
            deadline = time.monotonic() + 5
            while not server.engine.removed and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.02)  # the event loop releases the files next
            waited.append(server.engine.removed)
            return place(collection, adapter, limit)

        monkeypatch.setattr(runtime_adapters, "place", place_late)
        told = await load(server, again, files[kind])
        assert "Success" in told and waited == [server.engine.removed] != [[]], told
        await asyncio.sleep(4 * GRACE)
        assert len(server.files()) == (2 if kind == "near" else 1)
        if again == "one" or kind == "stranger":  # the name is a part of a compressed one's file, not of its Σ
            assert await server.ask(again) == answer
        await unload(server, again)
        await until(lambda: not server.files())

    check()


def test_what_loses_its_last_user_while_files_are_kept_goes_at_the_end_unless_it_gets_another(tmp_path):
    copies = AdapterCopies(tmp_path)
    gone, used = (tmp_path / name for name in ("gone", "used"))
    for path in (gone, used):
        path.touch()
        copies.use(path)
    with copies.kept():
        with copies.kept():
            copies.release(gone, used)
        assert gone.exists() and used.exists()
        copies.use(used)
    assert not gone.exists() and used.exists()
    copies.release(used)
    assert not used.exists()


@run
async def test_requests_under_way_keep_the_adapter_that_they_began_with(serve, files):
    server = serve()
    await load(server, "mine", files["near"])
    old = server.start("mine", steps=3)
    await old.begin()
    first = await server.ask("mine")
    old_id = server.names["mine"].lora_int_id
    await load(server, "mine", files["other"], load_inplace=True)
    assert server.names["mine"].lora_int_id != old_id
    second = await server.ask("mine")
    await asyncio.sleep(4 * GRACE)  # long after the engine would have forgotten the old one
    assert not server.engine.removed
    await unload(server, "mine")
    old.go()
    assert await old.content() == first != second
    await until(lambda: len(server.engine.removed) == 2)
    assert not server.files()


@run
async def test_an_aborted_request_frees_its_adapter(serve, files):
    server = serve()
    await load(server, "mine", files["near"])
    answer = server.start("mine")
    await answer.begin()
    await unload(server, "mine")
    await answer.abort()
    await until(lambda: not server.files())


@run
async def test_a_request_between_lookup_and_engine_gets_one_content_or_the_other(serve, files):
    server = serve()
    await load(server, "mine", files["near"])
    first = await server.ask("mine")
    soon, late = server.start("mine"), server.start("mine")
    await load(server, "mine", files["other"], load_inplace=True)
    soon.go()
    assert await soon.content() == first  # it looked the name up before
    await until(lambda: server.engine.removed)
    late.go()
    assert await late.content() == await server.ask("mine") != first  # the old one is gone for good
    gone = server.start("mine")
    await unload(server, "mine")
    await until(lambda: len(server.engine.removed) == 2)
    with pytest.raises(VLLMNotFoundError):
        await gone.begin()


@run
async def test_a_name_of_the_collection_can_be_replaced_and_removed(serve, files):
    server = serve()
    assert await server.ask("f0m0") == content_of(files["collection"], "f0m0")
    await load(server, "f0m0", files["near"], load_inplace=True)
    assert await server.ask("f0m0") != content_of(files["collection"], "f0m0")
    await unload(server, "f0m0")
    assert "f0m0" not in server.names and await server.ask("f0m1") == content_of(files["collection"], "f0m1")


def spoiled(folder, target, change):
    """A copy of an adapter with something wrong."""
    copy = shutil.copytree(folder, target)
    if change == "nan":
        tensors = load_file(copy / "adapter_model.safetensors")
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, copy / "adapter_model.safetensors")
    elif change == "empty":
        (copy / "adapter_model.safetensors").unlink()
    else:
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
    return copy


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("mine", "nan", "NaN"),
        ("mine", "empty", "adapter_model.safetensors"),
        ("mine", {"base_model_name_or_path": "gpt2"}, "gpt2"),
        ("../mine", {}, "looks like a path"),
        ("mine\n", {}, "blanks"),
        ("f0m0", {}, "already been loaded"),
        ("base", {}, "base model"),
    ],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(serve, files, tmp_path, name, change, told):
    @run
    async def check():
        server = serve()
        before = dict(server.names)
        answer = await load(server, name, spoiled(files["near"], tmp_path / "spoiled", change))
        assert isinstance(answer, ErrorResponse) and answer.error.code == 400 and told in answer.error.message
        assert dict(server.names) == before and not server.files() and not server.engine.calls

    check()


@run
async def test_an_uncompressed_adapter_must_fit_the_workers(serve, files, tmp_path):
    wide = write_member(tmp_path / "wide", 9, 1, rank=20)
    elsewhere = write_member(tmp_path / "elsewhere", 9, 1, shapes={"o_proj": (40, 40)})
    server = serve()
    for folder, told in ((wide, "rank 20"), (elsewhere, "changes o_proj"), (tmp_path / "none", "no such folder")):
        answer = await load(server, "mine", folder)
        assert answer.error.code == 400 and told in answer.error.message
    assert not server.files()


@run
async def test_an_adapter_that_the_engine_refuses_is_not_served(serve, files):
    server = serve()
    await load(server, "mine", files["other"])
    first = await server.ask("mine")
    server.engine.refuse = "no room"
    answer = await load(server, "mine", files["near"], load_inplace=True)
    assert answer.error.code == 400 and "no room" in answer.error.message
    assert await server.ask("mine") == first
    await until(lambda: server.engine.removed)
    assert len(server.files()) == 2


@run
async def test_a_folder_is_found_by_its_name_once(serve, files, tmp_path):
    shelf = tmp_path / "shelf"
    shutil.copytree(files["near"], shelf / "lazy")
    server = serve(directory=str(shelf))
    found = await asyncio.gather(*(server.models.resolve_lora("lazy") for _ in range(3)))
    assert all(isinstance(f, LoRARequest) for f in found) and len({f.lora_int_id for f in found}) == 1
    assert server.engine.calls == [("add_lora", "lazy")]
    assert await server.ask("lazy")


@run
async def test_a_name_never_leads_out_of_the_folder_of_adapters(serve, files, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "linked").symlink_to(files["near"])
    shutil.copytree(files["near"], shelf / "half")
    (shelf / "half" / "adapter_model.safetensors").unlink()
    (shelf / "half" / "adapter_model.safetensors").symlink_to(files["near"] / "adapter_model.safetensors")
    server = serve(directory=str(shelf))
    for name in ("linked", "half", "../near", str(files["near"]), "unknown", ".", "", "a\0b"):
        answer = await server.models.resolve_lora(name)
        assert isinstance(answer, ErrorResponse) and answer.error.code == 404, name
    assert not server.engine.calls


@run
async def test_a_bad_folder_of_a_known_name_is_a_bad_request(serve, files, tmp_path):
    spoiled(files["near"], tmp_path / "shelf" / "bad", "nan")
    answer = await serve(directory=str(tmp_path / "shelf")).models.resolve_lora("bad")
    assert answer.error.code == 400 and "NaN" in answer.error.message


@run
async def test_names_that_clients_make_up_leave_nothing_behind(serve, tmp_path):
    server = serve(directory=str(tmp_path))
    for i in range(50):
        await server.models.resolve_lora(f"made-up-{i}")
    assert not len(server.models.lora_resolver_lock)
