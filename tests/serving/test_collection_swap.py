"""Another revision of the collection in a running API server: what each request gets, with equal bases and others."""

import asyncio
import shutil

import pytest

from tests.collection.families import write_member
from tests.serving.fake_engine import FakeServer, content_of
from tests.serving.test_runtime_adapters import load, run, until
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add, remove
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.collection_revisions import KEPT
from vllm_jdlora.serving.collection_swap import LOAD_RPC, CollectionSwap
from vllm_jdlora.serving.options import AdapterPath


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("swap")
    members = {f"f{f}m{i}": write_member(root / f"f{f}m{i}", f, 10 * f + i) for f in range(2) for i in range(3)}
    members["odd"] = write_member(root / "odd", 7, 70)
    *families, odd = [read_adapter(folder) for folder in members.values()]
    for name, rank, adapters in (("two", 6, families), ("rebuilt", 7, families), ("beside", 6, families[1:])):
        compress(adapters, root / name, rank=rank, clusters=2, dtype="fp32", max_error=0.3)
        assert add(root / name, [odd]).plain
    near = write_member(root / "near", 0, 77)
    return {"root": root, "members": members, "near": near, "other": write_member(root / "other", 1, 78)}


@pytest.fixture
def server(made, tmp_path):
    path = shutil.copytree(made["root"] / "two", tmp_path / "served")
    (tmp_path / "arrivals").mkdir()
    return FakeServer(Collection.open(path), tmp_path / "arrivals")


@pytest.fixture
def swap(server):
    return CollectionSwap(server.runtime)


@pytest.fixture
def roomy(made, tmp_path):
    """A server with base slots for two collections."""
    (tmp_path / "arrivals").mkdir(exist_ok=True)
    return FakeServer(Collection.open(made["root"] / "two"), tmp_path / "arrivals", base_slots=4)


def events(logged, name):
    return [line for line in logged if line.startswith(f"jdlora event={name} ")]


def folder_of(server):
    return server.runtime.collection.path


def add_in_place(server, *folders):
    adapters = [read_adapter(folder, name) for name, folder in folders]
    return add(folder_of(server), adapters, replace_same_name=True).collection


@run
async def test_the_same_revision_changes_nothing(server, swap, logged):
    before = dict(server.names)
    done = await swap.load()
    assert " result=unchanged " in events(logged, "reload")[0]
    assert (done.added, done.removed, done.changed) == (0, 0, 0)
    assert dict(server.names) == before and not server.engine.calls


@run
async def test_adapters_added_on_disk_are_served_after_a_reload(server, swap, made, logged):
    before = dict(server.names)
    assert "odd" in before and AdapterPath.parse(before["odd"].lora_path) is None
    new = add_in_place(server, ("new", made["near"]), ("f0m0", made["other"]))
    done = await swap.load()
    assert (done.revision, done.added, done.removed, done.changed) == (new.manifest.revision, 1, 0, 1)
    assert done.same_bases and done.paused_seconds == 0
    told = f"result=served revision={done.revision} bases=kept added=1 changed=1 removed=0 paused_seconds=0"
    assert [told in line for line in events(logged, "reload")] == [True]
    assert server.engine.calls == [(LOAD_RPC, str(new.path), new.manifest.revision, False)]
    for name in ("new", "f0m0", "f0m1"):
        assert await server.ask(name) == content_of(new, name)
    # What did not change keeps its id and path, and with them its blocks in the prefix cache.
    assert server.names["f0m1"] is before["f0m1"]
    assert server.names["f0m0"].lora_int_id not in {r.lora_int_id for r in before.values()}
    assert await server.ask("odd") == read_adapter(made["members"]["odd"]).sha256


@run
async def test_an_adapter_that_never_changes_outlives_the_revisions_that_workers_keep(server, swap, made, tmp_path):
    path = server.names["f0m1"].lora_path
    await load(server, "mine", made["near"])
    paths = set()
    for i in range(KEPT + 3):
        add_in_place(server, ("new", write_member(tmp_path / str(i), 0, 200 + i)))
        await swap.load()
        paths.add(server.names["f0m1"].lora_path)
        for name in ("f0m1", "mine", "new", "odd"):
            await server.ask(name)
    assert path in paths and 1 < len(paths) < KEPT


@run
async def test_an_adapter_is_projected_on_the_bases_that_are_served_whatever_lies_on_disk(server, made):
    folder = folder_of(server)
    shutil.rmtree(folder)
    shutil.copytree(made["root"] / "rebuilt", folder)
    await load(server, "late", made["near"])
    late = await server.ask("late")
    shutil.rmtree(folder)
    shutil.copytree(made["root"] / "two", folder)
    untouched = FakeServer(Collection.open(folder), server.engine.arrivals)
    await load(untouched, "late", made["near"])
    assert await untouched.ask("late") == late


@run
async def test_a_request_under_way_ends_with_the_content_that_it_began_with(server, swap, made):
    before = content_of(server.runtime.collection, "f0m0")
    started, looked_up = server.start("f0m0"), server.start("f0m0")
    await started.begin()
    add_in_place(server, ("f0m0", made["other"]))
    await swap.load()
    looked_up.go()
    started.go()
    assert await started.content() == await looked_up.content() == before
    assert await server.ask("f0m0") == content_of(server.runtime.collection, "f0m0") != before
    await until(lambda: len(server.engine.removed) == 1)


@run
async def test_adapters_removed_on_disk_are_unknown_after_a_reload(server, swap):
    remove(folder_of(server), ["f1m2", "odd"])
    running = server.start("odd")
    await running.begin()
    done = await swap.load()
    assert done.removed == 2 and not {"f1m2", "odd"} & set(server.names)
    running.go()
    await running.content()  # its files were linked when the server started


@run
async def test_adapters_that_came_at_run_time_stay_unless_the_collection_has_the_name(server, swap, made):
    await load(server, "mine", made["near"])
    await load(server, "both", made["near"])
    mine = await server.ask("mine")
    new = add_in_place(server, ("both", made["other"]))
    done = await swap.load()
    assert done.changed == 1 and set(server.runtime.loaded) == {"mine"}
    assert await server.ask("mine") == mine
    assert await server.ask("both") == content_of(new, "both")


@run
async def test_with_other_bases_requests_wait_until_those_under_way_have_ended(server, swap, made):
    old = content_of(server.runtime.collection, "f0m0")
    await load(server, "mine", made["near"])
    await load(server, "strange", made["members"]["odd"])
    running, plain = server.start("f0m0"), server.start("odd", steps=3)
    await running.begin()
    await plain.begin()
    looked_up = server.start("f0m0", steps=1)
    swapping = asyncio.create_task(swap.load(str(made["root"] / "rebuilt")))
    await until(lambda: not server.running._open.is_set())
    waiting = asyncio.create_task(looked_up.content())
    looked_up.go()
    base = server.engine.generate(1, looked_up._step, "id")
    assert [o async for o in base] == [None]  # the base model goes on
    await asyncio.sleep(0.05)
    assert not swapping.done() and not waiting.done()
    assert (LOAD_RPC, str(made["root"] / "rebuilt")) not in [call[:2] for call in server.engine.calls]
    running.go()
    assert await running.content() == old
    done = await swapping
    new = server.runtime.collection
    assert new.path == made["root"] / "rebuilt" and not done.same_bases and done.paused_seconds > 0.04
    assert await waiting == content_of(new, "f0m0") != old
    plain.go()
    assert await plain.content() == await server.ask("strange") == read_adapter(made["members"]["odd"]).sha256
    # What came at run time is on the new bases.
    path = AdapterPath.parse(server.names["mine"].lora_path)
    assert path.revision == new.manifest.revision and path.arrival and await server.ask("mine")
    await until(lambda: sum(f.endswith(".safetensors") for f in server.files()) == 1)


@run
async def test_other_bases_for_which_there_are_slots_make_no_request_wait(roomy, made, logged):
    swap, old = CollectionSwap(roomy.runtime), roomy.runtime.collection
    await load(roomy, "mine", made["near"])
    mine = await roomy.ask("mine")
    running, looked_up, arrival = roomy.start("f0m1"), roomy.start("f0m1"), roomy.start("mine")
    await running.begin()
    await arrival.begin()
    done = await swap.load(str(made["root"] / "beside"))
    new = roomy.runtime.collection
    assert not done.same_bases and done.paused_seconds == 0 and new.path == made["root"] / "beside"
    assert " bases=replaced " in events(logged, "reload")[0]
    assert roomy.engine.calls[-1] == (LOAD_RPC, str(new.path), new.manifest.revision, True)
    # New requests get the new content at once, and those under way keep theirs.
    assert await roomy.ask("f0m1") == content_of(new, "f0m1") != content_of(old, "f0m1")
    assert AdapterPath.parse(roomy.names["mine"].lora_path).revision == new.manifest.revision
    for answer in (running, looked_up, arrival):
        answer.go()
    assert await running.content() == await looked_up.content() == content_of(old, "f0m1")
    assert await arrival.content() == mine != await roomy.ask("mine")
    await until(lambda: len(roomy.engine.removed) == 2)


@run
async def test_bases_are_taken_away_only_when_nobody_uses_them(roomy, made):
    swap, first = CollectionSwap(roomy.runtime), roomy.runtime.collection
    running, looked_up = roomy.start("f0m1"), roomy.start("f0m1", steps=1)
    await running.begin()
    await swap.load(str(made["root"] / "beside"))
    second = roomy.runtime.collection
    between = roomy.start("f0m1", steps=3)
    await between.begin()
    with pytest.raises(JDLoRAError, match=r"1 requests were still running after 0.05 s on bases"):
        await swap.load(str(first.path), drain_seconds=0.05)
    assert roomy.runtime.collection is second
    swapping = asyncio.create_task(swap.load(str(first.path)))
    await asyncio.sleep(0.05)
    assert not swapping.done() and await roomy.ask("f0m2") == content_of(second, "f0m2"), "others go on meanwhile"
    running.go()
    assert await running.content() == content_of(first, "f0m1")
    assert (await swapping).paused_seconds == 0
    # A name that was looked up two collections ago means what it means now.
    looked_up.go()
    assert await looked_up.content() == await roomy.ask("f0m1") == content_of(first, "f0m1")
    between.go()
    assert await between.content() == content_of(second, "f0m1")


@run
async def test_a_collection_of_another_form_is_no_neighbour(roomy, made):
    done = await CollectionSwap(roomy.runtime).load(str(made["root"] / "rebuilt"))
    assert not done.same_bases and roomy.engine.calls[-1][-1] is False


@run
async def test_a_name_that_was_looked_up_before_it_was_replaced_and_all_bases_were_means_what_it_means_now(
    server, swap, made
):
    looked_up = server.start("f0m1", steps=1)
    add_in_place(server, ("f0m1", made["other"]))
    await swap.load()
    await swap.load(str(made["root"] / "rebuilt"))
    looked_up.go()
    assert await looked_up.content() == content_of(server.runtime.collection, "f0m1")


@pytest.mark.parametrize("other_bases", [False, True])
def test_a_reload_that_fails_leaves_the_old_revision_serving(server, swap, made, other_bases):
    @run
    async def check():
        await load(server, "mine", made["near"])
        before, files = dict(server.names), server.files()
        if not other_bases:
            add_in_place(server, ("new", made["near"]))
        server.engine.refuse = "no room for the bases"
        with pytest.raises(JDLoRAError, match=r"no room for the bases.*goes on"):
            await swap.load(str(made["root"] / "rebuilt") if other_bases else None)
        server.engine.refuse = None
        assert dict(server.names) == before and server.files() == files
        for name in before:
            await server.ask(name)

    check()


@run
async def test_requests_that_do_not_end_stop_a_reload_and_not_the_server(server, swap, made):
    running = server.start("f0m0")
    await running.begin()
    with pytest.raises(JDLoRAError, match=r"1 requests .* still running"):
        await swap.load(str(made["root"] / "rebuilt"), drain_seconds=0.05)
    assert await server.ask("f0m1") == content_of(server.runtime.collection, "f0m1")
    running.go()
    await running.content()


@run
async def test_a_damaged_collection_is_not_served(server, swap, made, logged, tmp_path):
    damaged = shutil.copytree(made["root"] / "rebuilt", tmp_path / "damaged")
    content = bytearray((damaged / "scalings-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "scalings-00000.safetensors").write_bytes(content)
    with pytest.raises(JDLoRAError, match="was changed"):
        await swap.load(str(damaged))
    assert not server.engine.calls
    assert [f"path={damaged} result=refused " in line for line in events(logged, "reload")] == [True]


@run
async def test_a_name_that_another_model_has_is_refused(server, swap, made):
    server.names["given"] = type(server.names["odd"])("given", 99, str(made["near"]))  # by --lora-modules
    for name in ("given", "base"):
        add_in_place(server, (name, made["near"]))
        with pytest.raises(JDLoRAError, match=f"'{name}' and this server another model"):
            await swap.load()
        remove(folder_of(server), [name])


@run
async def test_a_plain_adapter_that_workers_cannot_load_is_refused(server, swap, tmp_path):
    add_in_place(server, ("wide", write_member(tmp_path / "wide", 8, 1, rank=20)))
    with pytest.raises(JDLoRAError, match="rank 20"):
        await swap.load()
