"""Adding and removing: what changes, what stays to the bit, and what a failure leaves behind."""

import itertools
import json
import os
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import reference
from tests.collection.families import write_member
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection, arrivals, rewrite
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.diff import diff
from vllm_jdlora.collection.edit import add, remove
from vllm_jdlora.collection.export import export_adapter
from vllm_jdlora.collection.schema import BASES_FILE
from vllm_jdlora.errors import JDLoRAError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two families of three adapters in two clusters, fp32; a newcomer of each family, and a stranger."""
    root = tmp_path_factory.mktemp("world")
    adapters = [
        read_adapter(write_member(root / "adapters" / f"f{family}-{i}", family, 10 * family + i))
        for family in range(2)
        for i in range(3)
    ]
    write_member(root / "new" / "f0-new", 0, 7)
    write_member(root / "new" / "f1-new", 1, 17)
    write_member(root / "new" / "stranger", 9, 27)
    compress(adapters, root / "c", rank=4, clusters=2, dtype="fp32")
    return root


@pytest.fixture
def collection(world, tmp_path):
    return shutil.copytree(world / "c", tmp_path / "c")


def new(world, *names):
    return [read_adapter(world / "new" / name) for name in names]


def projected_error(collection: Path, folder: Path) -> dict[int, float]:
    """Relative error of a PEFT folder's ΔW after dense projection on the spans of each cluster's bases."""
    bases = load_file(collection / BASES_FILE)
    clusters = next(iter(bases.values())).shape[0]
    deltas = reference.plain_deltas(folder)
    out = {}
    for k in range(clusters):
        lost = kept = 0.0
        for name, delta in deltas.items():
            u, v, w = bases[f"{name}.U"][k].double(), bases[f"{name}.V"][k].double(), delta.double()
            left, right = u @ torch.linalg.pinv(u), torch.linalg.pinv(v) @ v
            lost += float((w - left @ w @ right).square().sum())
            kept += float(w.square().sum())
        out[k] = (lost / kept) ** 0.5
    return out


def dense_error(collection: Path, name: str, folder: Path) -> float:
    served, original = reference.compressed_deltas(collection, name), reference.plain_deltas(folder)
    lost = sum(float((original[s] - served[s]).double().square().sum()) for s in original)
    return (lost / sum(float(w.double().square().sum()) for w in original.values())) ** 0.5


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_added_adapter_takes_its_best_cluster_with_its_exact_error(world, collection):
    before = everything(collection)
    done = add(collection, new(world, "f0-new", "f1-new"))
    opened = Collection.open(collection, verify=True)
    assert [a.name for a in opened.manifest.adapters][-2:] == ["f0-new", "f1-new"]
    for entry in done.compressed:
        errors = projected_error(collection, world / "new" / entry.name)
        assert entry.cluster == min(errors, key=errors.get)
        # fp32 bases and Σ; the dense reference rounds ΔW to fp32.
        assert entry.relative_error == pytest.approx(min(errors.values()), abs=1e-5)
        assert entry.relative_error == pytest.approx(
            dense_error(collection, entry.name, world / "new" / entry.name), abs=1e-5
        )
        row = opened.index_of(entry.name)
        by_slice = opened.slice_errors()[row].double().square()
        norms = torch.tensor(
            [w.double().square().sum() for w in reference.plain_deltas(world / "new" / entry.name).values()]
        )
        assert ((by_slice * norms).sum() / norms.sum()).sqrt().item() == pytest.approx(entry.relative_error, abs=1e-5)
    families = {a.name: a.cluster for a in opened.manifest.adapters}
    assert families["f0-new"] == families["f0-0"] != families["f1-new"] == families["f1-0"]
    assert everything(collection)[BASES_FILE] == before[BASES_FILE]
    assert opened.manifest.revision != json.loads(before["collection.json"])["revision"]


def test_what_was_there_stays_to_the_bit(world, collection):
    old = {name: reference.compressed_deltas(collection, name) for name in ("f0-0", "f1-2")}
    add(collection, new(world, "f0-new"))
    for name, deltas in old.items():
        now = reference.compressed_deltas(collection, name)
        assert all(torch.equal(deltas[s], now[s]) for s in deltas)


def test_the_short_list_of_clusters_holds_the_best(tmp_path, monkeypatch):
    """Eight families in eight clusters, chosen by two of four slices; strangers' best clusters differ by little."""
    monkeypatch.setattr(arrivals, "_PROBES", 2)
    adapters = [read_adapter(write_member(tmp_path / f"f{f}-{i}", f, 10 * f + i)) for f in range(8) for i in range(2)]
    collection = compress(adapters, tmp_path / "c", rank=4, clusters=8, dtype="fp32")
    newcomers = [read_adapter(write_member(tmp_path / f"new{f}", f, 100 + f)) for f in range(8)]
    chosen = arrivals.best_clusters(collection, newcomers).tolist()
    for adapter, k in zip(newcomers, chosen, strict=True):
        errors = projected_error(collection.path, adapter.path)
        assert k == min(errors, key=errors.get)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_member_removed_and_added_again_gets_its_fit_time_scalings(world, tmp_path, dtype):
    """Identity 16 of the notes: projection on converged bases is the fit's own Σ."""
    adapters = [read_adapter(p) for p in sorted((world / "adapters").iterdir())]
    before = compress(adapters, tmp_path / "c", rank=4, clusters=2, dtype=dtype)
    row = before.index_of("f1-1")
    sigma, entry = before.sigma(row).clone(), before.manifest.adapters[row]
    remove(tmp_path / "c", ["f1-1"])
    with pytest.raises(JDLoRAError, match="no compressed adapter named 'f1-1'"):
        Collection.open(tmp_path / "c").index_of("f1-1")
    add(tmp_path / "c", [read_adapter(world / "adapters" / "f1-1")])
    after = Collection.open(tmp_path / "c", verify=True)
    row = after.index_of("f1-1")
    # Both round the same fp64 solution; the stacks they were computed from differ in order only.
    torch.testing.assert_close(after.sigma(row), sigma, rtol=1e-6 if dtype == "fp32" else 1e-2, atol=1e-6)
    assert after.manifest.adapters[row].cluster == entry.cluster
    assert after.manifest.adapters[row].relative_error == pytest.approx(entry.relative_error, abs=1e-6)


def test_the_export_of_an_added_adapter_is_its_projection(world, collection, tmp_path):
    done = add(collection, new(world, "f1-new"))
    export_adapter(done.collection, "f1-new", tmp_path / "export")
    bases = load_file(collection / BASES_FILE)
    exported, original = reference.plain_deltas(tmp_path / "export"), reference.plain_deltas(world / "new" / "f1-new")
    for name, w in original.items():
        u, v = (bases[f"{name}.{side}"][done.compressed[0].cluster].double() for side in "UV")
        projection = u @ torch.linalg.pinv(u) @ w.double() @ torch.linalg.pinv(v) @ v
        torch.testing.assert_close(exported[name].double(), projection, rtol=1e-4, atol=1e-5)  # fp32 files


def test_growing_by_its_rank_makes_the_new_adapter_lossless_and_spares_the_others(world, collection):
    names = [a.name for a in Collection.open(collection).manifest.adapters]
    old = {name: reference.compressed_deltas(collection, name) for name in names}
    done = add(collection, new(world, "stranger"), grow=4)
    opened = Collection.open(collection, verify=True)
    assert opened.manifest.rank == 8
    assert done.compressed[0].relative_error < 1e-5  # the bound for fp32 storage
    assert dense_error(collection, "stranger", world / "new" / "stranger") < 1e-5
    for name, deltas in old.items():
        now = reference.compressed_deltas(collection, name)
        # Exact in exact arithmetic; the reference's fp64 products may sum the added zeros in another order.
        assert all(torch.allclose(deltas[s], now[s], rtol=1e-6, atol=1e-9) for s in deltas)


def test_growing_by_less_than_its_rank_helps_the_more_the_wider(world, tmp_path):
    errors = []
    for extra in (0, 1, 2, 3, 4):
        folder = shutil.copytree(world / "c", tmp_path / f"c{extra}")
        errors.append(add(folder, new(world, "stranger"), grow=extra).compressed[0].relative_error)
    assert all(later < sooner for sooner, later in itertools.pairwise(errors))


def test_an_adapter_above_the_limit_stays_plain_with_the_reason(world, collection):
    done = add(collection, new(world, "stranger", "f0-new"), max_error=0.3)
    assert [e.name for e in done.compressed] == ["f0-new"]
    assert done.plain[0].name == "stranger" and "is above 0.3" in done.plain[0].reason
    opened = Collection.open(collection, verify=True)
    assert read_adapter(opened.plain_path("stranger")).sha256 == new(world, "stranger")[0].sha256
    assert done.plain[0].relative_error == pytest.approx(
        min(projected_error(collection, world / "new" / "stranger").values()), abs=1e-5
    )


def test_slices_the_collection_lacks_and_other_shapes(world, collection, tmp_path):
    other = write_member(tmp_path / "other-targets", 0, 3, shapes={"q_proj": (48, 40), "v_proj": (24, 40)})
    done = add(collection, [read_adapter(other)])
    assert done.plain[0].reason.startswith("the collection has no bases for model.layers.0.self_attn.v_proj and 1 more")
    wrong = write_member(tmp_path / "wrong", 0, 3, shapes={"q_proj": (50, 40)})
    with pytest.raises(JDLoRAError, match="q_proj is 50 x 40, in c it is 48 x 40"):
        add(collection, [read_adapter(wrong)])


def test_an_adapter_of_another_base_model_is_refused(world, collection, tmp_path):
    folder = shutil.copytree(world / "new" / "f0-new", tmp_path / "other")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other-model"}))
    with pytest.raises(JDLoRAError, match="for base model 'org/other-model', c holds those of 'tiny'"):
        add(collection, [read_adapter(folder)])


def test_a_known_name_is_refused_or_replaced(world, collection):
    other = read_adapter(world / "new" / "f1-new", "f0-1")
    with pytest.raises(JDLoRAError, match="has an adapter named 'f0-1' already"):
        add(collection, [other])
    done = add(collection, [other], replace_same_name=True)
    assert done.replaced == ("f0-1",)
    opened = Collection.open(collection, verify=True)
    assert len(opened.manifest.adapters) == 6
    assert opened.manifest.adapters[opened.index_of("f0-1")].sha256 == other.sha256
    assert dense_error(collection, "f0-1", world / "new" / "f1-new") < 0.3


def test_removing_drops_rows_and_plain_folders_and_keeps_the_rest(world, collection):
    add(collection, new(world, "stranger"), max_error=0.3)
    kept = {name: reference.compressed_deltas(collection, name) for name in ("f0-0", "f1-2")}
    done = remove(collection, ["f0-1", "stranger"])
    assert done.compressed == ("f0-1",) and done.plain == ("stranger",)
    opened = Collection.open(collection, verify=True)
    assert not (collection / "plain").exists()
    assert [a.name for a in opened.manifest.adapters] == ["f0-0", "f0-2", "f1-0", "f1-1", "f1-2"]
    for name, deltas in kept.items():
        assert all(torch.equal(deltas[s], d) for s, d in reference.compressed_deltas(collection, name).items())
    with pytest.raises(JDLoRAError, match="no adapter named 'nobody'; nothing was removed"):
        remove(collection, ["f0-0", "nobody"])
    with pytest.raises(JDLoRAError, match="no compressed adapter would be left"):
        remove(collection, [a.name for a in opened.manifest.adapters])


def test_only_the_shards_that_change_are_written_again(world, collection, monkeypatch):
    """Two rows to a shard: the shape that a collection of many thousands has."""
    row = Collection.open(collection).sigma(0)
    monkeypatch.setattr(rewrite, "_SHARD_BYTES", 2 * row.numel() * 4)
    remove(collection, ["f1-2"])  # writes the shards anew, two rows each
    shards = sorted(collection.glob("scalings-*"))
    assert len(shards) == 3
    inodes = [s.stat().st_ino for s in shards]
    add(collection, new(world, "f0-new", "f1-new"))
    opened = Collection.open(collection, verify=True)
    assert len(sorted(collection.glob("scalings-*"))) == 4
    now = [s.stat().st_ino for s in sorted(collection.glob("scalings-*"))]
    assert now[:2] == inodes[:2] and now[2] != inodes[2]
    for entry in opened.manifest.adapters:
        source = world / ("new" if entry.name.endswith("new") else "adapters") / entry.name
        assert dense_error(collection, entry.name, source) == pytest.approx(entry.relative_error, abs=1e-5)
    remove(collection, ["f0-2"])  # row 2: the first shard stays
    assert (collection / shards[0].name).stat().st_ino == inodes[0]
    for entry in Collection.open(collection, verify=True).manifest.adapters:
        source = world / ("new" if entry.name.endswith("new") else "adapters") / entry.name
        assert dense_error(collection, entry.name, source) == pytest.approx(entry.relative_error, abs=1e-5)


def test_another_folder_gets_its_own_bytes(world, collection, tmp_path):
    before = everything(collection)
    add(collection, new(world, "f0-new"), output=tmp_path / "n")
    assert everything(collection) == before
    assert (tmp_path / "n" / BASES_FILE).stat().st_nlink == 1
    with pytest.raises(JDLoRAError, match="exists already"):
        add(collection, new(world, "f1-new"), output=tmp_path / "n")


@pytest.mark.parametrize("step", ["save", "keep", "seal", "add_plain"])
def test_a_write_that_fails_loses_nothing(world, collection, monkeypatch, step):
    before = everything(collection)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite.Draft, step, full)
    with pytest.raises(JDLoRAError, match=r"No space left on device.*nothing was changed"):
        add(collection, new(world, "stranger", "f0-new"), max_error=0.3)
    assert everything(collection) == before
    assert [p.name for p in collection.parent.iterdir()] == ["c"]
    Collection.open(collection, verify=True)


def test_damage_is_not_blessed_by_a_new_digest(world, collection):
    file = collection / BASES_FILE
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(JDLoRAError, match=f"{BASES_FILE}: was changed after it was written"):
        add(collection, new(world, "f0-new"), grow=1)
    add(collection, new(world, "f0-new"))  # bases that stay keep their digest
    with pytest.raises(JDLoRAError, match=f"{BASES_FILE}: was changed after it was written"):
        Collection.open(collection, verify=True)


def test_damage_in_a_rewritten_shard_is_found(world, collection):
    file = collection / "scalings-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(JDLoRAError, match=r"scalings-00000\.safetensors: was changed after it was written"):
        add(collection, new(world, "f0-new"))
    with pytest.raises(JDLoRAError, match=r"scalings-00000\.safetensors: was changed after it was written"):
        remove(collection, ["f0-0"])


def test_two_edits_at_once_both_take_effect(world, collection):
    pids = []
    for name in ("f0-new", "f1-new", "stranger"):
        pid = os.fork()
        if pid == 0:
            try:
                torch.set_num_threads(1)
                add(collection, new(world, name))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    names = {a.name for a in Collection.open(collection, verify=True).manifest.adapters}
    assert {"f0-new", "f1-new", "stranger"} <= names


def test_drift_tells_strangers_from_family(world, tmp_path):
    """Rank 8 has room for a second family of rank 4 in each cluster: a rebuild can give it."""
    adapters = [read_adapter(p) for p in sorted((world / "adapters").iterdir())]
    roomy = compress(adapters, tmp_path / "c", rank=8, clusters=2, dtype="fp32").path
    family = add(roomy, new(world, "f0-new"), output=tmp_path / "a").drift
    assert family.after_rebuild is None or family.after_rebuild > 0.5 * family.before_rebuild
    strangers = [read_adapter(write_member(tmp_path / f"s{i}", 5, 50 + i)) for i in range(3)]
    found = add(roomy, strangers, output=tmp_path / "b").drift
    assert found.arrivals_error > 0.9 > 0.2 > found.stored_error
    assert found.rebuild_pays and "it pays" in found.told()
    assert sum(c.arrivals for c in found.clusters) == 3
    # What the estimate promises, a rebuild by compression from nothing keeps.
    again = compress([*adapters, *strangers], tmp_path / "again", rank=8, clusters=2, dtype="fp32").manifest
    mean = sum(a.relative_error for a in again.adapters) / len(again.adapters)
    assert mean < found.before_rebuild / 2
    assert mean == pytest.approx(found.after_rebuild, abs=0.1)


def test_without_room_a_rebuild_does_not_pay(world, collection, tmp_path):
    """Rank 4 is full with one family: refitting for a second one would spoil the first."""
    strangers = [read_adapter(write_member(tmp_path / f"s{i}", 5, 50 + i)) for i in range(3)]
    found = add(collection, strangers).drift
    assert found.arrivals_error > 0.9 and not found.rebuild_pays


def test_diff_lists_what_changed(world, collection, tmp_path):
    first = Collection.open(collection)
    assert diff(first, first).same
    other = read_adapter(world / "new" / "f1-new", "f0-1")
    add(collection, [other], output=tmp_path / "b", replace_same_name=True)
    add(tmp_path / "b", new(world, "stranger"), grow=1)
    remove(tmp_path / "b", ["f1-0"])
    found = diff(first, Collection.open(tmp_path / "b"))
    assert not found.same and not found.same_bases
    assert found.added == ("stranger",) and found.removed == ("f1-0",)
    assert [c.name for c in found.content] == ["f0-1"] == [c.name for c in found.moved]
    assert found.settings == {"rank": (4, 5)}
    assert [c.name for c in found.errors] == ["f0-1"]
