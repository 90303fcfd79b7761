"""Memory of a tree of processes by what lies behind it, and its processor time, measured on processes of known size."""

import subprocess
import sys

import psutil
import pytest
from process_tree import child_of_port, cpu_seconds, memory_by_process

MIB = 1 << 20
CHILD = """
import mmap, subprocess, sys, time
own = b"x" * (40 << 20)
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
touched = sum(mapped[i] for i in range(0, len(mapped), 4096))
end = time.process_time() + 0.3
while time.process_time() < end: pass
if sys.argv[2] == "parent":
    child = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1], "child", ""], stdout=subprocess.PIPE)
    child.stdout.readline()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def tree(tmp_path):
    file = tmp_path / "mapped"
    file.write_bytes(b"\1" * (24 * MIB))
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(file), "parent", CHILD, "--port", "45871"], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield psutil.Process(process.pid)
    for child in psutil.Process(process.pid).children():
        child.kill()
    process.kill()
    process.wait()


def test_own_memory_and_mapped_files_are_told_apart_in_every_process(tree):
    assert child_of_port(45871) == tree
    found = memory_by_process(tree)
    assert len(found) == 2 and len({title.partition(" ")[0] for title in found}) == 1
    for memory in found.values():
        # Python itself takes about 10 MiB, some of it shared between the two.
        assert 40 * MIB <= memory.anonymous < 60 * MIB
        # Each has half of what both map.
        assert 12 * MIB <= memory.file < 24 * MIB
        assert memory.share == pytest.approx(memory.anonymous + memory.file + memory.shared, rel=0.02)
        assert memory.resident >= 64 * MIB


def test_processor_time_is_that_of_all(tree):
    assert 0.6 <= cpu_seconds(tree) < 3
