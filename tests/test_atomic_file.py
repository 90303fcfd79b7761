"""A file is replaced whole or stays as it was, and nothing is left beside it."""

import os

import pytest

from vllm_jdlora.atomic_file import replacing


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("durable", [False, True])
def test_what_was_written_takes_the_place(tmp_path, before, durable):
    file = tmp_path / "file.json"
    if before is not None:
        file.write_text(before)
    with replacing(file, durable=durable) as new:
        new.write_text("new")
        assert (file.read_text() if file.exists() else None) == before
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == [file.name]


def test_a_block_that_fails_changes_nothing(tmp_path):
    file = tmp_path / "file.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(file) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == [file.name]


def test_a_disk_that_refuses_is_told(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").touch()
    with pytest.raises(OSError), replacing(folder) as new:
        new.write_text("a file does not take the place of a folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_two_writers_do_not_meet(tmp_path):
    file = tmp_path / "file.json"
    with replacing(file) as one, replacing(file) as other:
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one", "the block that ended last"
    assert os.listdir(tmp_path) == [file.name]
