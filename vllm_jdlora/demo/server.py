"""``vllm serve`` as a child process: started with given arguments, waited for, and ended with all its children."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from vllm_jdlora.errors import JDLoRAError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.5
# What vLLM logs of an exception: "(EngineCore pid=7) ERROR 11-24 10:03:04 [core.py:9] ValueError: …", also without
# process or level. An exception quoted in a warning is none.
_CAUSE = re.compile(
    r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?(?:vllm: error: |(?:\w+\.)*(?=\w*(?:Error|Exception): ))(.+)$", re.MULTILINE
)
_WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed")


class ServerFailed(JDLoRAError):
    """The server ended, or was not ready in time. ``log_tail`` holds the last lines of its log."""

    def __init__(self, message: str, log_tail: str):
        super().__init__(message)
        self.log_tail = log_tail


class Server:
    """A running ``vllm serve``; use as a context manager.

    The child gets a session of its own, so that Ctrl-C reaches this process only, and everything vLLM started
    ends when the context does.

    Args:
        args: what follows ``vllm serve``, the model first; without ``--host`` and ``--port``.
        port: a free one is chosen if ``None``.
        env: variables on top of this process's own; model hubs and usage statistics are off unless it says
            otherwise.
        timeout: seconds until ``/health`` must answer.
        log_path: file for stdout and stderr, overwritten; a temporary file that is kept if ``None``.

    Attributes:
        url: ``http://127.0.0.1:PORT``, without a closing slash.
        log_path: the log's path.
        command: the whole command.

    Raises:
        ServerFailed: on entering the context.
        JDLoRAError: on entering the context, if there is no ``vllm`` command.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300.0,
        log_path: Path | None = None,
    ):
        self.port = free_port() if port is None else port
        self.url = f"http://{HOST}:{self.port}"
        self.command = [_vllm_command(), "serve", *args, "--host", HOST, "--port", str(self.port)]
        self.env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ, **(env or {})}
        self.timeout = timeout
        if log_path is None:
            handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
            os.close(handle)
            log_path = Path(name)
        self.log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, on_wait: Callable[[float], None] | None = None) -> None:
        """Start the child and return once ``/health`` answers; on failure the child is ended first.

        ``on_wait`` is called with the seconds waited so far, about twice a second.
        """
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(on_wait or (lambda seconds: None))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the child and all it started: politely first, then at once. Does nothing on a second call."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("vllm serve did not end within %.0f s and is killed", _STOP_SECONDS)
        # Also when the child is gone: an engine process that outlived it would keep its memory.
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()

    def exit_code(self) -> int | None:
        """The child's exit code; ``None`` while it runs or when it was not started."""
        return None if self._process is None else self._process.poll()

    def log_tail(self, lines: int = 40) -> str:
        """The last ``lines`` lines of the log."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _wait_until_healthy(self, on_wait: Callable[[float], None]) -> None:
        started = time.monotonic()
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while True:
                waited = time.monotonic() - started
                if (code := self.exit_code()) is not None:
                    raise self._failure(f"vllm serve ended with exit code {code} before it was ready")
                if waited > self.timeout:
                    raise self._failure(f"vllm serve was not ready within {self.timeout:.0f} s")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                on_wait(waited)
                time.sleep(_POLL_SECONDS)

    def _failure(self, what: str) -> ServerFailed:
        tail = self.log_tail()
        logger.error("%s; the end of %s:\n%s", what, self.log_path, tail)
        cause = _first_cause(self.log_path.read_text(errors="replace"))
        return ServerFailed(f"{what}{f' ({cause})' if cause else ''}: see {self.log_path}", tail)


def free_port(preferred: int | None = None) -> int:
    """``preferred`` if nothing listens there, else a port that the system finds free."""
    for port in [0] if preferred is None else [preferred, 0]:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the server does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise JDLoRAError(f"no free port on {HOST}")


def _first_cause(log: str) -> str | None:
    """The first error in a vLLM log that is not only about a child process that failed."""
    for match in _CAUSE.finditer(log):
        line = match.group(1).strip()
        if not any(wrapper in line for wrapper in _WRAPPERS):
            return line[:300]
    return None


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _vllm_command() -> str:
    # Beside this interpreter first: the one on PATH may belong to another environment.
    beside = Path(sys.executable).parent / "vllm"
    command = str(beside) if beside.exists() else shutil.which("vllm")
    if command is None:
        raise JDLoRAError("there is no `vllm` command in this environment: run `make setup`")
    return command
