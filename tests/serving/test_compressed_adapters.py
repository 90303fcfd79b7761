"""Adapters come and go under ids, in revisions and as arrivals; what an id means is right, and nothing is left over."""

import dataclasses
import gc
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest

from tests import tiny_llama
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.arrival_file import arrival_path, write_arrival
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.edit import add, remove
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.collection_revisions import CollectionRevisions, open_revision
from vllm_jdlora.serving.compressed_adapters import CompressedAdapters
from vllm_jdlora.serving.load_clock import LoadClock
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scaling_buffer import ScalingBuffer

RANK, SLOTS = 8, 3


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [read_adapter(tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj", "v_proj"])) for i in range(6)]


@pytest.fixture(scope="module")
def original(adapters, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("original") / "collection"
    return compress(adapters[:4], target, rank=RANK, clusters=2, dtype="fp32").path


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A collection that a test may change."""
    shutil.copytree(original, tmp_path / "collection")
    return tmp_path / "collection"


def opened(folder: Path) -> Collection:
    return open_revision(folder, Collection.open(folder, verify=False).manifest.revision)


def serve(folder: Path, arrivals: Path | None = None, slots: int = SLOTS, **revisions) -> CompressedAdapters:
    collection = opened(folder)
    slices = len(collection.manifest.slices)
    scalings = ScalingBuffer(slots, slices, RANK, diagonal=False, dtype=torch.float32, device="cpu")
    scalings.lay_out(SimpleNamespace(order=torch.arange(slices), covered=torch.arange(slices)), RANK)
    return CompressedAdapters(CollectionRevisions(collection, str(arrivals or ""), **revisions), scalings, LoadClock())


def request_of(collection: Collection, name: str, lora_id: int) -> LoRARequest:
    entry = collection.manifest.adapters[collection.index_of(name)]
    return LoRARequest(name, lora_id, str(AdapterPath(collection.manifest.revision, entry.cluster, name)))


def bind(served: CompressedAdapters, request: LoRARequest, announced: bool = True) -> None:
    served.bind(request, AdapterPath.parse(request.lora_path), announced=announced)


def on_device(served: CompressedAdapters, lora_id: int) -> torch.Tensor:
    """Σ that a token of this id would get."""
    index = served.directory.index(lora_id)
    return served.scalings.sigma[served.slots.slots(torch.tensor([index]).numpy())[0]]


def arrival(served: CompressedAdapters, folder: Path, seed: int, lora_id: int) -> tuple[LoRARequest, torch.Tensor]:
    """An adapter that came at run time, and its Σ."""
    manifest = served.revisions.newest.manifest
    shape = len(manifest.slices), RANK, RANK
    sigma = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    facts = {"cluster": 1, "name": f"new-{seed}", "relative_error": 0.1, "source_sha256": "0" * 64}
    digest = write_arrival(folder, sigma, manifest=manifest, **facts)
    path = AdapterPath(manifest.revision, 1, f"new-{seed}", digest)
    return LoRARequest(f"new-{seed}", lora_id, str(path)), sigma


# --- revisions ---


def test_requests_of_an_older_revision_keep_their_scalings_when_the_folder_is_replaced(folder, adapters):
    """a0 is replaced under its name and a1 removed, by the commands that operators use, in place."""
    served = serve(folder)
    first = served.revisions.newest
    old = [request_of(first, name, i + 1) for i, name in enumerate(["a0", "a1", "a2"])]
    expected = [first.sigma(i).clone() for i in range(3)]
    bind(served, old[2])
    remove(folder, ["a0", "a1"], force=True)
    add(folder, [dataclasses.replace(adapters[5], name="a0")], force=True)
    second = opened(folder)
    assert second.manifest.shares_bases_with(first.manifest)
    served.revisions.add(second)
    new = request_of(second, "a0", 11)
    for request, sigma in zip([*old, new], [*expected, second.sigma(second.index_of("a0"))], strict=True):
        bind(served, request)
        assert torch.equal(on_device(served, request.lora_int_id), sigma)
    assert not torch.equal(on_device(served, 11), expected[0])
    with pytest.raises(JDLoRAError, match="no compressed adapter named 'a1'"):
        bind(served, LoRARequest("a1", 12, str(AdapterPath(second.manifest.revision, 0, "a1"))))
    assert 12 not in served


def test_a_revision_that_is_not_what_was_asked_for_is_refused(folder):
    with pytest.raises(JDLoRAError, match=r"is revision .* and not 0123"):
        open_revision(folder, "0123")


def test_paths_that_name_what_is_not_there_are_refused(folder):
    served = serve(folder)
    revision = served.revisions.newest.manifest.revision
    entry = served.revisions.newest.manifest.adapters[0]
    for path, message in (
        (AdapterPath("ffff", 0, "a0"), "revision ffff"),
        (AdapterPath(revision, entry.cluster, "nobody"), "'nobody'"),
        (AdapterPath(revision, 1 - entry.cluster, "a0"), f"lies in {entry.cluster}"),
        (AdapterPath(revision, 0, "new", "ab" * 32), "no such adapters"),
    ):
        with pytest.raises(JDLoRAError, match=message):
            bind(served, LoRARequest(path.name, 1, str(path)))
        assert len(served.directory) == 0


def test_old_revisions_are_dropped_when_they_are_far_back_and_long_out_of_use(folder, tmp_path):
    now = [0.0]
    served = serve(folder, slots=8, kept=1, grace_seconds=60.0, clock=lambda: now[0])
    collections = [served.revisions.newest]
    for name in ("a1", "a2", "a3"):
        remove(folder, [name], force=True)
        collections.append(opened(folder))
        served.revisions.add(collections[-1])
        served.drop_old_revisions([])
    assert len(served.revisions) == 4  # none has been out of use for long
    requests = [request_of(c, "a0", i + 1) for i, c in enumerate(collections)]
    for request in requests:
        bind(served, request)
    now[0] = 61.0
    served.drop_old_revisions([0, 1, 4])  # the first revision is in the step
    assert [c.manifest.revision in served.revisions for c in collections] == [True, False, True, True]
    assert sorted(served.directory) == [1, 3, 4] and len(served.slots) == 3
    with pytest.raises(JDLoRAError, match="long ago"):
        bind(served, requests[1])


def test_a_collection_with_other_bases_shares_none(original, adapters, tmp_path):
    manifest = Collection.open(original).manifest
    for i, options in enumerate(({"clusters": 1}, {"rank": 7}, {"method": "diag"}, {"dtype": "bf16"})):
        made = {"rank": RANK, "clusters": 2, "dtype": "fp32"} | options
        other = compress(adapters[:4], tmp_path / f"{i}", **made).manifest
        assert not manifest.shares_bases_with(other) and not other.shares_bases_with(manifest)
    assert manifest.shares_bases_with(manifest)


# --- ids ---


def test_two_ids_of_one_adapter_share_its_slot_until_the_last_one_goes(folder):
    served = serve(folder)
    one, two = (request_of(served.revisions.newest, "a0", i) for i in (1, 2))
    bind(served, one)
    bind(served, two)
    assert len(served.slots) == 1 and served.loads == 1
    served.pin(1)
    served.unbind(1)
    for i, name in enumerate(["a1", "a2", "a3"]):
        bind(served, request_of(served.revisions.newest, name, 10 + i))
    assert torch.equal(on_device(served, 2), served.revisions.newest.sigma(0))  # still pinned, under the other id
    assert served.unbind(2) and not served.unbind(2)


def test_an_adapter_that_comes_back_under_another_id_is_still_on_the_device(folder):
    served = serve(folder)
    bind(served, request_of(served.revisions.newest, "a0", 1))
    served.clear()
    assert len(served.directory) == 0
    bind(served, request_of(served.revisions.newest, "a0", 2))
    assert served.loads == 1


# --- arrivals ---


def test_an_arrival_is_served_from_its_file_and_forgotten_with_its_id(folder, tmp_path):
    served = serve(folder, tmp_path)
    request, sigma = arrival(served, tmp_path, 7, lora_id=70)
    bind(served, request)
    assert torch.equal(on_device(served, 70), sigma)
    assert served.directory.arrivals == 1
    # Its Σ leaves the device and comes back without the file.
    for i in range(4):
        bind(served, request_of(served.revisions.newest, f"a{i}", i + 1))
    arrival_path(tmp_path, AdapterPath.parse(request.lora_path).arrival).rename(tmp_path / "gone")
    served.activate(70)
    assert torch.equal(on_device(served, 70), sigma)
    assert served.unbind(70)
    assert served.directory.arrivals == 0 and len(served.slots) == SLOTS - 1
    with pytest.raises(JDLoRAError, match="load the adapter again"):
        bind(served, request)


def test_an_arrival_outlives_the_revision_that_it_came_in(folder, tmp_path):
    now = [0.0]
    served = serve(folder, tmp_path, kept=0, grace_seconds=0.0, clock=lambda: now[0])
    request, sigma = arrival(served, tmp_path, 7, lora_id=70)
    bind(served, request)
    remove(folder, ["a1"], force=True)
    served.revisions.add(opened(folder))
    served.drop_old_revisions([])
    assert len(served.revisions) == 1
    assert torch.equal(on_device(served, 70), sigma)
    served.unbind(70)
    bind(served, request)  # a request that was waiting
    assert torch.equal(on_device(served, 70), sigma)


def test_revisions_on_other_bases_are_served_beside_and_forgotten_with_all_that_is_on_their_bases(
    folder, adapters, tmp_path
):
    served, arrivals = serve(folder, tmp_path, slots=8), tmp_path
    first = served.revisions.newest
    old, (came, sigma) = request_of(first, "a1", 1), arrival(served, arrivals, 7, lora_id=70)
    bind(served, old)
    second = compress(adapters[2:], tmp_path / "second", rank=RANK, clusters=2, dtype="fp32")
    served.revisions.add_beside(second, range(2, 4))
    bind(served, came)  # a request that was waiting
    new, (later, later_sigma) = request_of(second, "a3", 2), arrival(served, arrivals, 8, lora_id=80)
    for request in (new, later):
        bind(served, request)
    for request, numbers in ((old, range(2)), (came, range(2)), (new, range(2, 4)), (later, range(2, 4))):
        cluster = AdapterPath.parse(request.lora_path).cluster
        index = served.directory.index(request.lora_int_id)
        assert served.directory.adapter(index).base == numbers[cluster]
    for lora_id, expected in ((1, first.sigma(1)), (70, sigma), (2, second.sigma(second.index_of("a3")))):
        assert torch.equal(on_device(served, lora_id), expected)
    assert served.drop_other_bases() == [range(2)] and served.drop_other_bases() == []
    assert set(served.directory) == {2, 80} and torch.equal(on_device(served, 80), later_sigma)
    for request in (old, came):
        with pytest.raises(JDLoRAError, match="take the request from the collection that the server serves now"):
            bind(served, request)


def test_memory_is_flat_over_thousands_of_arrivals(folder, tmp_path):
    """Each is loaded by an RPC, unloaded while a request runs, and bound again by that request's next step."""
    served = serve(folder, tmp_path)
    made = [arrival(served, tmp_path, seed, 1)[0] for seed in range(8)]

    def rounds(first: int, count: int) -> None:
        for lora_id in range(first, first + count):
            request = LoRARequest(f"new-{lora_id}", lora_id, f"{made[lora_id % 8].lora_path}-{lora_id}")
            bind(served, request)
            served.unbind(lora_id)
            bind(served, request, announced=False)
            served.forget_unannounced([request])
            assert lora_id in served

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    rounds(1, 100)
    before = tensors()
    tracemalloc.start()
    rounds(101, 2000)
    gc.collect()
    # safetensors itself loses four numbers of 28 bytes with each file that it reads, here 4,000.
    assert tracemalloc.get_traced_memory()[0] < 4000 * 4 * 28 + 50_000
    tracemalloc.stop()
    assert tensors() == before
    assert len(served.directory) == 2 * SLOTS
    assert len(served.directory._adapters) < 12


def test_an_announced_arrival_is_never_forgotten_by_itself(folder, tmp_path):
    served = serve(folder, tmp_path)
    requests = [arrival(served, tmp_path, seed, seed + 1)[0] for seed in range(20)]
    for request in requests:
        bind(served, request, announced=False)
        served.announce(request.lora_int_id)  # the RPC came after the step
        served.forget_unannounced([request])
    assert len(served.directory) == 20
