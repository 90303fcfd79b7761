"""Two commands that write to one place: one result, whole, and a clear line for whoever came second."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import tiny_llama
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.collection import Collection, atomic_folder
from vllm_jdlora.collection.atomic_folder import written_atomically
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj"]) for i in range(6)]


@pytest.mark.parametrize("force", [False, True])
def test_of_two_commands_at_once_each_ends_well_or_is_refused_and_nothing_is_mixed(folders, tmp_path, force):
    """Which of the two is first is left to chance."""
    mine, others = folders[:3], folders[3:]
    if force:
        compress([read_adapter(folder) for folder in folders], tmp_path / "c", rank=2, clusters=1)
    command = [sys.executable, "-m", "vllm_jdlora.cli", "compress", "--rank", "3", "--clusters", "1", "--json"]
    command += ["--force"] if force else []
    running = [
        subprocess.Popen(
            [*command, *map(str, chosen), "-o", str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for chosen in (mine, others)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    found = Collection.open(tmp_path / "c", verify=True).manifest
    codes = [process.returncode for process in running]
    assert 0 in codes and set(codes) <= {0, 2}
    for code, (stdout, stderr) in zip(codes, outputs, strict=True):
        assert "Traceback" not in stderr
        if code == 0:
            whole = [entry["name"] for entry in json.loads(stdout)["adapters"]]
            assert whole in (["a0", "a1", "a2"], ["a3", "a4", "a5"])
        else:
            assert "another process is compressing into it" in stderr or "exists already" in stderr
    assert [entry.name for entry in found.adapters] in (["a0", "a1", "a2"], ["a3", "a4", "a5"])
    if not force:
        assert codes.count(0) == 1


def test_a_result_that_came_meanwhile_is_not_replaced_without_force(folders, tmp_path):
    target = tmp_path / "c"
    adapters = [read_adapter(folder) for folder in folders]
    with (
        pytest.raises(JDLoRAError, match="Directory not empty"),
        written_atomically(target, "mark"),
    ):
        compress(adapters[:3], target, rank=2, clusters=1)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert len(Collection.open(target, verify=True).manifest.adapters) == 3


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_is_replaced_is_always_one_or_the_other(tmp_path, monkeypatch, at_once):
    if not at_once:  # as on systems that cannot let two names change places
        monkeypatch.setattr(atomic_folder, "_exchanged", lambda one, other: False)
    elif not hasattr(ctypes.CDLL(None), "renameat2"):
        pytest.skip("this system cannot let two names change places")
    target, stop, gaps = tmp_path / "c", threading.Event(), []

    def look():
        while not stop.is_set():
            gaps.append(not target.exists())

    with written_atomically(target, "mark") as draft:
        (draft / "mark").write_text("0")
    looking = threading.Thread(target=look)
    looking.start()
    try:
        for turn in range(100):
            with written_atomically(target, "mark", force=True) as draft:
                (draft / "mark").write_text(str(turn))
    finally:
        stop.set()
        looking.join()
    assert (target / "mark").read_text() == "99" and [p.name for p in tmp_path.iterdir()] == ["c"]
    if at_once:
        assert len(gaps) > 100 and not any(gaps)
