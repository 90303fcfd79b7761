"""A disk that is full, or a file that may not grow: nothing half-written is left, what was there is kept, and the same
command goes on when there is room."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_llama
from vllm_jdlora.adapter import read_adapter
from vllm_jdlora.cli import main
from vllm_jdlora.collection import Collection
from vllm_jdlora.collection.build import compress
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.adapter_copies import AdapterCopies

ROOT = Path(__file__).parents[2]
OPTIONS = ["--rank", "4", "--clusters", "2"]

# One process for all limits: each command runs in a fork whose files may not grow above the limit.
LIMITED = """
import json, os, resource, sys
import torch
from vllm_jdlora.cli import main
torch.set_num_threads(1)
for limit, arguments in json.load(sys.stdin):
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        told = open(reader, encoding="utf-8").read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told]), flush=True)
        continue
    os.dup2(writer, 2)
    os.dup2(writer, 1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os._exit(main(arguments))
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for i in range(6):
        tiny_llama.write_adapter(root / f"a{i}", i, targets=["q_proj", "k_proj"])
    return root


def run_limited(commands: list[tuple[int, list[str]]]) -> list[tuple[int, str]]:
    """(exit code, what was printed) of each (bytes a file may have, 0 for any number; arguments of `jdlora`)."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def told(stderr: str) -> str:
    """The one line that says what was wrong; progress bars go before it."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("jdlora: ")]
    assert len(lines) == 1, stderr
    return lines[0]


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def compressing(adapters: Path, target: Path) -> list[str]:
    return ["compress", str(adapters), "-o", str(target), "--force", "--json", *OPTIONS]


def test_a_compression_that_fills_the_disk_keeps_what_was_there_and_goes_on_later(adapters, tmp_path):
    """Files may have as many bytes as each file of a whole run has, but one: every kind of write fails once."""
    whole = compress([read_adapter(p) for p in sorted(adapters.iterdir())], tmp_path / "whole", rank=4, clusters=2)
    straight = content(whole.path)
    old = compress([read_adapter(adapters / f"a{i}") for i in range(2)], tmp_path / "old", rank=2, clusters=1).path
    # Of state.json, of the labels, of the first slice, of the second, which is larger.
    work = {40, 119, 2_800, 3_000}
    limits = sorted(work | {len(data) - 1 for data in straight.values()})
    commands = []
    for limit in limits:
        (tmp_path / str(limit)).mkdir()
        shutil.copytree(old, tmp_path / str(limit) / "c")
        commands.append((limit, compressing(adapters, tmp_path / str(limit) / "c")))
    before, kept = content(old), set()
    for limit, (code, stderr) in zip(limits, run_limited(commands), strict=True):
        assert code == 2 and "cannot be written (" in told(stderr) and "nothing was changed" in told(stderr), limit
        assert "File too large" in told(stderr)
        folder = tmp_path / str(limit)
        assert {p.name for p in folder.iterdir()} <= {"c", ".c.work"} and content(folder / "c") == before, limit
        kept |= {limit} if any((folder / ".c.work").glob("pass-*/0*.safetensors")) else set()
    assert kept == {limit for limit in limits if limit >= 3_000}  # finished slices, when a later write fails
    again = [(0, compressing(adapters, tmp_path / str(n) / "c")) for n in limits]
    for limit, (code, stderr) in zip(limits, run_limited(again), strict=True):
        assert code == 0, stderr
        assert content(tmp_path / str(limit) / "c") == straight
        assert [p.name for p in (tmp_path / str(limit)).iterdir()] == ["c"]


def test_edits_and_exports_that_fill_the_disk_change_nothing(adapters, tmp_path):
    collection = compress([read_adapter(adapters / f"a{i}") for i in range(5)], tmp_path / "c", rank=4, clusters=2).path
    before = content(collection)
    commands = [
        ["add", str(collection), str(adapters / "a5")],
        ["remove", str(collection), "a0"],
        ["refresh", str(collection), str(adapters), "-o", str(tmp_path / "new")],
        ["export", str(collection), "a1", "-o", str(tmp_path / "exported")],
    ]
    for arguments, (code, stderr) in zip(commands, run_limited([(1_000, a) for a in commands]), strict=True):
        assert code == 2 and "cannot be written (" in told(stderr), (arguments, stderr)
        assert content(collection) == before
    assert {p.name for p in tmp_path.iterdir()} <= {"c", ".new.work"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_on_a_disk_that_really_is_full_nothing_is_lost_and_room_cures_it(adapters, small_disk, capsys):
    command = compressing(adapters, small_disk / "c")
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    os.truncate(filler, filler.stat().st_size - (24 << 10))
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {p.name for p in small_disk.iterdir()} <= {"filler", ".c.work"}
    filler.unlink()
    assert main(command) == 0
    assert [p.name for p in small_disk.iterdir()] == ["c"]
    assert len(Collection.open(small_disk / "c", verify=True).manifest.adapters) == 6


def test_an_adapter_that_comes_to_a_server_whose_disk_is_full_is_refused_and_leaves_nothing(adapters, tmp_path):
    copies, adapter = AdapterCopies(tmp_path), read_adapter(adapters / "a0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        with pytest.raises(JDLoRAError, match=r"cannot be copied to .* \(File too large\)"):
            copies.copy(adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [p for p in tmp_path.rglob("*") if p.name != "adapters"]
    assert copies.copy(adapter).path.is_dir()
