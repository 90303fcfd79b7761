"""What a server's processes cost: memory of each, by what lies behind it, and processor time of all."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

_FIELDS = {"Rss": "resident", "Pss": "share", "Pss_Anon": "anonymous", "Pss_File": "file", "Pss_Shmem": "shared"}


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        resident: of its pages that are in memory, whoever else has them too.
        share: the same with pages of several processes divided among them. It is the sum of the next three.
        anonymous: not of any file: what the process itself has made.
        file: of mapped files, which the system can drop and read again.
        shared: of shared memory.
    """

    resident: int
    share: int
    anonymous: int
    file: int
    shared: int

    def as_json(self) -> dict[str, int]:
        return asdict(self)


def child_of_port(port: int) -> psutil.Process:
    """The child of this process that was told to listen on this port."""
    return next(p for p in psutil.Process().children() if str(port) in p.cmdline())


def memory_by_process(root: psutil.Process) -> dict[str, Memory]:
    """Title of each process of the tree, numbered where several have one, → its memory."""
    found: dict[str, Memory] = {}
    for process in _tree(root):
        try:
            memory, title = _memory(process.pid), _title(process)
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            continue  # it ended meanwhile
        same = sum(known.partition(" ")[0] == title for known in found)
        found[f"{title} {same + 1}" if same else title] = memory
    return found


def cpu_seconds(root: psutil.Process) -> float:
    """Processor time of the tree so far, its ended processes included: what a busy machine does not stretch."""
    total = 0.0
    for process in _tree(root):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _tree(root: psutil.Process) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)]


def _title(process: psutil.Process) -> str:
    """vLLM names its processes; the API server keeps the command line of ``vllm serve``."""
    command = process.cmdline()
    named = [part for part in command if part.startswith("VLLM::")]
    if named:
        return named[0].split()[0].removeprefix("VLLM::")
    if "serve" in command:
        return "APIServer"
    return "resource_tracker" if any("resource_tracker" in part for part in command) else process.name()


def _memory(pid: int) -> Memory:
    values = dict.fromkeys(_FIELDS.values(), 0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        key, _, rest = line.partition(":")
        if key in _FIELDS:
            values[_FIELDS[key]] = int(rest.split()[0]) << 10
    return Memory(**values)
