"""Collections that were damaged or made to harm: each is refused with a line that names the file."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import tiny_llama
from vllm_jdlora.adapter import WEIGHTS_FILE, file_digest, read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection, atomic_folder
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.schema import BASES_FILE, MANIFEST_FILE
from vllm_jdlora.errors import JDLoRAError

SCALINGS = "scalings-00000.safetensors"


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    root = tmp_path_factory.mktemp("untouched")
    adapters = [read_adapter(tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj"])) for i in range(3)]
    return compress(adapters, root / "c", rank=3, clusters=2).path


@pytest.fixture
def collection(untouched, tmp_path):
    return shutil.copytree(untouched, tmp_path / "c")


def resealed(path, change):
    """Change the manifest's JSON and give it a right revision again: an attacker can do that too."""
    raw = json.loads((path / MANIFEST_FILE).read_text())
    change(raw)
    del raw["revision"]
    raw["revision"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:32]
    (path / MANIFEST_FILE).write_text(json.dumps(raw))


def test_an_untouched_collection_opens(collection):
    assert len(Collection.open(collection, verify=True).manifest.adapters) == 3


@pytest.mark.parametrize("name", [MANIFEST_FILE, BASES_FILE, SCALINGS])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_files_are_named(collection, name, damage):
    file = collection / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size - 7)
    with pytest.raises(JDLoRAError, match=name):
        Collection.open(collection, verify=False)


def test_one_flipped_bit_is_found(collection):
    data = bytearray((collection / SCALINGS).read_bytes())
    data[-3] ^= 1
    (collection / SCALINGS).write_bytes(data)
    Collection.open(collection, verify=False)
    with pytest.raises(JDLoRAError, match=f"{SCALINGS}: was changed"):
        Collection.open(collection, verify=True)


def test_a_huge_header_is_refused(collection):
    (collection / BASES_FILE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(JDLoRAError, match=BASES_FILE):
        Collection.open(collection)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v[:, :-1].contiguous() for k, v in t.items()},
        lambda t: {k: v.float() for k, v in t.items()},
        lambda t: dict(list(t.items())[1:]),
        lambda t: t | {"extra": torch.zeros(1)},
    ],
    ids=["shape", "dtype", "missing", "extra"],
)
def test_tensors_that_do_not_fit_the_manifest_are_named(collection, change):
    save_file(change(load_file(collection / BASES_FILE)), collection / BASES_FILE)
    with pytest.raises(JDLoRAError, match=f"{BASES_FILE}: "):
        Collection.open(collection, verify=False)


def test_values_that_are_not_finite_are_named(collection):
    tensors = load_file(collection / SCALINGS)
    tensors["sigma"][1, 0, 0, 0] = torch.nan
    save_file(tensors, collection / SCALINGS)
    resealed(collection, lambda raw: raw["files"].__setitem__(SCALINGS, file_digest(collection / SCALINGS)))
    with pytest.raises(JDLoRAError, match=f"{SCALINGS}: sigma holds NaN"):
        Collection.open(collection, verify=True)


def set_name(value):
    return lambda raw: raw["adapters"][0].__setitem__("name", value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (set_name("../../etc/passwd"), "looks like a path"),
        (set_name("a\nb"), "control characters"),
        (set_name("a1"), "two adapters have one name"),
        (set_name(7), "name is 7"),
        (lambda raw: raw["adapters"][0].__setitem__("cluster", 9), "cluster 9"),
        (lambda raw: raw["adapters"][0].__setitem__("cluster", -1), "cluster -1"),
        (lambda raw: raw["adapters"][0].__setitem__("relative_error", float("nan")), "error nan"),
        (lambda raw: raw["adapters"].pop(), r"errors\.safetensors"),
        (lambda raw: raw.__setitem__("rank", 0), "rank"),
        (lambda raw: raw.__setitem__("rank", True), "rank"),
        (lambda raw: raw.__setitem__("rank", 5), "says BF16"),
        (lambda raw: raw.__setitem__("format_version", 1), "format_version"),
        (lambda raw: raw.__setitem__("method", "magic"), "magic"),
        (lambda raw: raw.__setitem__("surprise", 1), "surprise"),
        (lambda raw: raw.__delitem__("slices"), "slices"),
        (lambda raw: raw["files"].__setitem__("../x.safetensors", "0" * 64), "not a file of a collection"),
        (lambda raw: raw["files"].__delitem__(SCALINGS), SCALINGS),
    ],
)
def test_manifests_that_lie_are_refused(collection, change, told):
    resealed(collection, change)
    with pytest.raises(JDLoRAError, match=told) as error:
        Collection.open(collection, verify=True)
    assert str(collection) in str(error.value)


def test_an_edited_manifest_is_found_by_its_revision(collection):
    raw = json.loads((collection / MANIFEST_FILE).read_text())
    raw["adapters"][0]["relative_error"] = 0.0
    (collection / MANIFEST_FILE).write_text(json.dumps(raw))
    with pytest.raises(JDLoRAError, match="revision does not belong"):
        Collection.open(collection, verify=False)


def test_a_linked_tensor_file_is_refused(collection, tmp_path):
    (collection / BASES_FILE).rename(tmp_path / "elsewhere")
    (collection / BASES_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JDLoRAError, match="is a link"):
        Collection.open(collection, verify=False)


def test_a_deep_json_is_refused(collection):
    (collection / MANIFEST_FILE).write_text("[" * 100_000)
    with pytest.raises(JDLoRAError, match=MANIFEST_FILE):
        Collection.open(collection)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "c"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), written_atomically(target, "old", force=True) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError("disk full, say")
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (target / "old").read_text() == "old"


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    target = tmp_path / "c"
    target.mkdir()
    (target / "mark").touch()
    with pytest.raises(JDLoRAError, match="--force"), written_atomically(target, "mark") as folder:
        pass
    with written_atomically(target, "mark", force=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"] and [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_file_in_the_way_is_never_replaced(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(JDLoRAError, match="not a folder"), written_atomically(tmp_path / "c", "mark", force=True):
        pass
    assert (tmp_path / "c").read_text() == "mine"


def test_force_never_replaces_a_folder_of_other_things(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(JDLoRAError, match="not replaced"), written_atomically(tmp_path, MANIFEST_FILE, force=True):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("interruption", [OSError("disk"), KeyboardInterrupt()])
def test_an_interruption_between_the_two_renames_puts_the_old_folder_back(tmp_path, monkeypatch, interruption):
    target = tmp_path / "c"
    target.mkdir()
    (target / "mark").write_text("old")

    def stopped(*_):
        raise interruption

    monkeypatch.setattr(atomic_folder, "_exchanged", lambda one, other: False)  # where there are two
    monkeypatch.setattr(os, "rename", stopped)
    with (
        pytest.raises((JDLoRAError, KeyboardInterrupt)),
        written_atomically(target, "mark", force=True) as folder,
    ):
        (folder / "mark").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and (target / "mark").read_text() == "old"


def test_others_may_read_what_was_written(collection):
    umask = os.umask(0)
    os.umask(umask)
    for file in collection.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name


# --- plain adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def with_plain(tmp_path):
    folders = [tiny_llama.write_adapter(tmp_path / f"a{i}", 1, targets=["q_proj"]) for i in range(3)]
    folders.append(tiny_llama.write_adapter(tmp_path / "stranger", 99, targets=["q_proj"]))
    adapters = [read_adapter(folder) for folder in folders]
    return compress(adapters, tmp_path / "p", rank=4, clusters=1, max_error=0.5).path


def test_a_plain_adapter_that_is_a_link_is_refused(with_plain, tmp_path):
    folder = with_plain / "plain" / "stranger"
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "stranger")
    with pytest.raises(JDLoRAError, match="stranger: is a link or missing"):
        Collection.open(with_plain, verify=False)


def test_a_plain_adapter_that_is_gone_or_changed_is_named(with_plain):
    config = with_plain / "plain" / "stranger" / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(JDLoRAError, match="stranger: was changed"):
        Collection.open(with_plain, verify=True)
    config.unlink()
    with pytest.raises(JDLoRAError, match=r"adapter_config\.json: is a link or missing"):
        Collection.open(with_plain, verify=False)


@pytest.mark.parametrize("value", [7, None, "", "a\x1b[2Jb"])
def test_slice_names_are_lines_of_text(collection, value):
    resealed(collection, lambda raw: raw["slices"][0].__setitem__("name", value))
    with pytest.raises(JDLoRAError, match=r"slices: name is|is not a slice's name"):
        Collection.open(collection, verify=False)


@pytest.mark.parametrize("value", [64.0, "64", True, 0])
def test_slice_shapes_are_whole_numbers(collection, value):
    resealed(collection, lambda raw: raw["slices"][0].__setitem__("d_in", value))
    with pytest.raises(JDLoRAError, match=r"slices: d_in is|empty shape"):
        Collection.open(collection, verify=False)


# --- bombs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", [MANIFEST_FILE, BASES_FILE, SCALINGS])
def test_what_is_no_file_is_not_waited_for(collection, name, kind):
    (collection / name).unlink()
    if kind == "pipe":
        os.mkfifo(collection / name)
    elif kind == "device":
        (collection / name).symlink_to("/dev/zero")
    else:
        (collection / name).mkdir()
    with pytest.raises(JDLoRAError, match=name):
        Collection.open(collection)


def test_a_manifest_of_holes_is_not_read(collection):
    os.truncate(collection / MANIFEST_FILE, 1 << 40)
    with pytest.raises(JDLoRAError, match=r"the most that is read"):
        Collection.open(collection)


def test_a_field_that_is_there_twice_is_refused(collection):
    text = (collection / MANIFEST_FILE).read_text()
    (collection / MANIFEST_FILE).write_text(text.replace('"rank": 3,', '"rank": 3, "rank": 3,'))
    with pytest.raises(JDLoRAError, match="is there twice"):
        Collection.open(collection)


@pytest.mark.parametrize("field", ["parameters", "rank"])
@pytest.mark.parametrize("value", [-1, 1 << 60, 10**400])
def test_sizes_beyond_all_measure_are_refused(collection, field, value):
    resealed(collection, lambda raw: raw["adapters"][0].__setitem__(field, value))
    with pytest.raises(JDLoRAError, match="has the size"):
        Collection.open(collection)


def test_a_collection_of_another_base_model_is_refused_when_adapters_are_added(collection, tmp_path, capsys):
    resealed(collection, lambda raw: raw["base_model"].__setitem__("name", "some/other-llama"))
    newcomer = tiny_llama.write_adapter(tmp_path / "new", 9, targets=["q_proj"])
    assert main(["add", str(collection), str(newcomer)]) == 2
    told = capsys.readouterr().err
    assert "tiny-llama" in told and "other-llama" in told and "Traceback" not in told
    resealed(collection, lambda raw: raw["base_model"].__setitem__("name", None))
    before = (collection / MANIFEST_FILE).read_bytes()
    wide = tiny_llama.write_adapter(tmp_path / "wide", 9, targets=["q_proj"])
    tensors = load_file(wide / WEIGHTS_FILE)
    save_file({k: t[:, :32].contiguous() if "lora_A" in k else t for k, t in tensors.items()}, wide / WEIGHTS_FILE)
    assert main(["add", str(collection), str(wide)]) == 2
    assert "the adapter is for another base model" in capsys.readouterr().err
    assert (collection / MANIFEST_FILE).read_bytes() == before


# --- fuzzing ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([10**400, 1 << 63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places_in(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_any_change_of_a_manifest_that_was_sealed_again_ends_in_a_line(untouched, tmp_path, data):
    """Every command that reads a collection: it works, or says what is wrong; it never fails otherwise."""
    collection = tmp_path / "fuzzed"
    if not collection.exists():
        shutil.copytree(untouched, collection)
    raw = json.loads((untouched / MANIFEST_FILE).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([p for p in places_in(raw) if p and p[0] != "revision"]))
        inside = raw
        for key in way:
            inside = inside[key]
        what = data.draw(st.sampled_from(["value", "gone", "named", "twice"]))
        if what == "gone":
            del inside[last]
        elif what == "named" and isinstance(inside, dict):
            inside[data.draw(st.text(max_size=6))] = inside[last]
        elif what == "twice" and isinstance(inside, list):
            inside.append(inside[last])
        else:
            inside[last] = data.draw(VALUES)
    raw.pop("revision", None)
    raw["revision"] = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:32]
    (collection / MANIFEST_FILE).write_text(json.dumps(raw))
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        for command in (["validate"], ["inspect"], ["inspect", "--json"], ["export", "a1", "-o", str(tmp_path / "x")]):
            code = main([command[0], str(collection), *command[1:]])
            assert code in (0, 1, 2), (command, code)
            shutil.rmtree(tmp_path / "x", ignore_errors=True)
    for line in error.getvalue().splitlines():
        assert line.startswith("jdlora: ") and line.isprintable() and len(line) < 2000, line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fuzzed"]


@settings(
    deadline=None,
    max_examples=int(os.environ.get("JDLORA_FUZZ_EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from([MANIFEST_FILE, BASES_FILE, SCALINGS, "errors.safetensors"]), st.data())
def test_any_damage_to_a_file_is_found(untouched, tmp_path, name, data):
    collection = tmp_path / "fuzzed"
    shutil.rmtree(collection, ignore_errors=True)
    shutil.copytree(untouched, collection)
    content = bytearray((collection / name).read_bytes())
    before = bytes(content)
    at = data.draw(st.integers(0, len(content)))
    piece = data.draw(st.binary(min_size=1, max_size=4))
    how = data.draw(st.sampled_from(["over", "in", "out", "cut"]))
    if how == "over":
        content[at : at + len(piece)] = piece
    elif how == "in":
        content[at:at] = piece
    elif how == "out":
        del content[at : at + len(piece)]
    else:
        del content[at:]
    (collection / name).write_bytes(content)
    if bytes(content) == before:
        return
    try:
        opened = Collection.open(collection, verify=True)
    except JDLoRAError as error:
        assert str(collection) in str(error)
        return
    # Layout of the manifest, as blanks between its lines, is nobody's content.
    assert name == MANIFEST_FILE and opened.manifest == Collection.open(untouched, verify=False).manifest
