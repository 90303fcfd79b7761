"""The server process: waited for, explained when it fails, ended with all its children. With a fake `vllm`."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest

from vllm_jdlora.demo import server as server_module
from vllm_jdlora.demo.server import HOST, Server, ServerFailed, free_port
from vllm_jdlora.errors import JDLoRAError

FAKE = Path(__file__).with_name("fake_vllm.py")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A factory of servers that run the fake command."""
    command = tmp_path / "vllm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    command.chmod(0o755)
    monkeypatch.setattr(server_module, "_vllm_command", lambda: str(command))

    def make(behaviour: str, **options) -> Server:
        return Server(["model"], env={"FAKE_VLLM": behaviour}, log_path=tmp_path / "logs" / "server.log", **options)

    return make


def alive(pid: int) -> bool:
    # A killed child may stay a zombie until init takes it: that is as good as ended.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(server: Server) -> int:
    return int(re.search(r"child: (\d+)", server.log_path.read_text()).group(1))


def wait_until_ended(pid: int) -> bool:
    deadline = time.monotonic() + 5  # SIGKILL takes milliseconds; the rest is for a busy machine
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_it_is_up_inside_the_context_and_gone_with_its_children_after(fake):
    waits: list[float] = []
    server = fake("ready")
    server.start(on_wait=waits.append)
    try:
        assert server.exit_code() is None
        assert f"arguments: serve model --host {HOST} --port {server.port}" in server.log_path.read_text()
        child = child_of(server)
        assert alive(child)
    finally:
        server.stop()
    assert wait_until_ended(child)
    assert waits == sorted(waits)
    assert free_port(server.port) == server.port
    server.stop()  # nothing to do the second time


def test_its_children_end_when_the_body_of_the_context_raises(fake):
    with pytest.raises(KeyboardInterrupt), fake("ready") as server:
        child = child_of(server)
        raise KeyboardInterrupt
    assert wait_until_ended(child)


def test_a_server_that_dies_is_explained_by_its_first_error(fake):
    with (
        pytest.raises(ServerFailed, match=r"exit code 1 .*the weights are not there.*server\.log") as failure,
        fake("dies"),
    ):
        pass
    assert "Engine core" not in str(failure.value) and "\n" not in str(failure.value)
    assert "See root cause above" in failure.value.log_tail


def test_a_server_that_is_never_ready_is_given_up_and_ended(fake):
    server = fake("never", timeout=1.5)
    with pytest.raises(ServerFailed, match="not ready within 2 s"), server:
        pass
    assert wait_until_ended(child_of(server))


def test_hubs_and_statistics_are_off_unless_the_caller_says_otherwise(fake, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert fake("ready").env["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert fake("ready").env["HF_HUB_OFFLINE"] == "0"


def test_a_port_that_is_taken_is_not_chosen():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("vllm: error: --lora-collection needs a folder", "--lora-collection needs a folder"),
        ("(Worker pid=3) ERROR 11-24 10:03:04 [w.py:1] torch.OutOfMemoryError: full", "OutOfMemoryError: full"),
        ("ValueError: no such model", "ValueError: no such model"),
        ("(APIServer pid=8) WARNING 11-24 10:03:04 [s.py:2] may cause fd limit errors like `OSError: [Errno 24]", None),
        ("RuntimeError: Engine core initialization failed. See root cause above.", None),
    ],
)
def test_the_first_error_of_a_log_is_its_cause(line, cause):
    assert server_module._first_cause(f"INFO starting\n{line}\nINFO ending\n") == cause


def test_without_the_vllm_command_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(JDLoRAError, match="make setup"):
        Server(["model"])
