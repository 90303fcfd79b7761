"""Files that are truncated, written over or taken away while they are in use: an error that says so, never a crash and
never numbers of another file."""

import os
import shutil

import pytest
import torch

from tests import tiny_llama
from vllm_jdlora.adapter import WEIGHTS_FILE, read_adapter
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.collection.schema import BASES_FILE, ERRORS_FILE
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.peft_config import CONFIG_FILE

SCALINGS = "scalings-00000.safetensors"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [read_adapter(tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj", "v_proj"])) for i in range(4)]


@pytest.fixture(scope="module")
def untouched(adapters, tmp_path_factory):
    return compress(adapters, tmp_path_factory.mktemp("made") / "c", rank=4, clusters=2).path


@pytest.fixture
def folder(untouched, tmp_path):
    return shutil.copytree(untouched, tmp_path / "c")


def readers(collection):
    name = collection.manifest.slices[0].name
    return {
        SCALINGS: [lambda: collection.sigma(3), lambda: collection.matrices(0)],
        BASES_FILE: [lambda: collection.basis(name), lambda: collection.basis(name, [1])],
        ERRORS_FILE: [collection.slice_errors],
    }


def flip_last_bit(file):
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


@pytest.mark.parametrize("name", [SCALINGS, BASES_FILE, ERRORS_FILE])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "written over", "longer"])
def test_a_file_of_an_open_collection_that_is_damaged_is_refused_until_it_is_put_back(folder, name, damage):
    collection = Collection.open(folder)
    good = [read() for read in readers(collection)[name]]
    content, file = (folder / name).read_bytes(), folder / name
    if damage == "written over":
        flip_last_bit(file)
    else:
        os.truncate(file, {"truncated": len(content) - 3, "emptied": 0, "longer": len(content) + 1}[damage])
    for _ in range(2):
        for read in readers(collection)[name]:
            with pytest.raises(JDLoRAError, match=rf"{name}: (was changed in its place|ends too early)"):
                read()
    for other in {SCALINGS, BASES_FILE, ERRORS_FILE} - {name}:
        for read in readers(collection)[other]:
            read()
    with open(file, "r+b") as opened:
        opened.truncate(0)
        opened.write(content)
    for read, expected in zip(readers(collection)[name], good, strict=True):
        found = read()
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


def test_a_file_that_is_only_touched_is_read_on(folder):
    collection = Collection.open(folder)
    before = collection.sigma(1)
    os.utime(folder / SCALINGS, ns=(1, 1))
    assert torch.equal(collection.sigma(1), before)


def test_an_open_collection_stays_when_its_folder_is_replaced_or_removed(adapters, folder):
    collection = Collection.open(folder)
    sigma, basis = collection.sigma(0), collection.basis(collection.manifest.slices[0].name)[0]
    compress(adapters[2:], folder, rank=3, clusters=1, force=True)
    assert torch.equal(collection.sigma(0), sigma)
    shutil.rmtree(folder)
    assert torch.equal(collection.basis(collection.manifest.slices[0].name)[0], basis)


@pytest.mark.parametrize("damage", ["truncated", "written over", "touched", "gone"])
def test_an_adapter_that_changes_between_its_check_and_its_compression_is_named(tmp_path, damage):
    folders = [tiny_llama.write_adapter(tmp_path / f"a{i}", i, targets=["q_proj"]) for i in range(3)]
    adapters = [read_adapter(folder) for folder in folders]
    file = folders[1] / WEIGHTS_FILE
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "written over":
        flip_last_bit(file)
    elif damage == "touched":
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    with pytest.raises(JDLoRAError, match=rf"a1/{WEIGHTS_FILE}: (changed since|not a readable|ends too early)"):
        compress(adapters, tmp_path / "c", rank=2, clusters=1)
    # Work is kept where the same command may go on, as when a file that is gone comes back.
    left = {p.name for p in tmp_path.iterdir()} - {".c.work"}
    assert left == {"a0", "a1", "a2"} and (tmp_path / ".c.work").exists() == (damage == "gone")


def test_a_plain_adapter_that_changes_before_it_is_copied_is_named(tmp_path):
    """Its weights are not read again when it is kept as it is, so its digest tells."""
    folders = [tiny_llama.write_adapter(tmp_path / f"a{i}", 1, targets=["q_proj"]) for i in range(3)]
    folders.append(tiny_llama.write_adapter(tmp_path / "stranger", 99, targets=["q_proj"]))
    adapters = [read_adapter(folder) for folder in folders]

    def change(stage: str, done: int, total: int) -> None:
        if stage == "write" and done == total:
            (folders[3] / CONFIG_FILE).write_text("{}")

    with pytest.raises(JDLoRAError, match="stranger: changed since it was read"):
        compress(adapters, tmp_path / "c", rank=4, clusters=1, max_error=0.5, progress=change)
    assert not (tmp_path / "c").exists()
