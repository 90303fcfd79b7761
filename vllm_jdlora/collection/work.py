"""The folder of a compression under way, `.NAME.work` beside the output: what makes it go on where it was stopped.

A slice's file appears, complete, when the slice is finished. All of it belongs to one recipe (the adapters' content,
the options, the version); another recipe starts anew.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_jdlora.atomic_file import replacing
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.slice_fit import SliceFit

logger = logging.getLogger("vllm.jdlora")

_STATE = "state.json"
_LABELS = "labels.safetensors"


class WorkFolder:
    """A `FitStore` on disk. As a context manager it locks the folder and decides about its end.

    The folder vanishes when the block ends well or by an error that starting again would not cure. It stays when the
    block was interrupted or the disk refused, and of course when the process was killed.
    """

    def __init__(self, output: Path, digest: str):
        output = Path(output).absolute()
        self._output = output
        self.path = output.with_name(f".{output.name}.work")
        self._digest = digest
        self._lock: int | None = None
        self._accepted: list[float] = []

    def open(self, temporary: Path) -> None:
        """Take the folder; one of another recipe is emptied. `temporary`: where this process writes the result.

        Raises:
            JDLoRAError: another process compresses into the same output.
        """
        self._take_lock()
        state = self._read_state()
        if state.get("recipe") != self._digest:
            if state:
                logger.warning("%s: belongs to other adapters or options; starting anew", self.path)
            for entry in self.path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            state = {}
        self._accepted = [float(value) for value in state.get("accepted", [])]
        left = self._output.parent / str(state.get("temporary", ""))
        if state.get("temporary") and left.name.startswith(f".{self._output.name}.") and left.suffix == ".new":
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while it wrote
        self._temporary = temporary.name
        self._write_state()

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        refused = isinstance(getattr(error, "__cause__", None), (OSError, SafetensorError))  # by the disk
        if error is None or (isinstance(error, JDLoRAError) and not refused):
            shutil.rmtree(self.path, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            error.add_note("stopped; the same command goes on from the last finished slice")
        os.close(self._lock)
        self._lock = None

    # --- FitStore -------------------------------------------------------------------------------------------------

    def begin(self, number: int, cluster: Tensor) -> None:
        self._folder(number).mkdir(exist_ok=True)
        _save({"cluster": cluster}, self._folder(number) / _LABELS)

    def cluster(self, number: int) -> Tensor | None:
        tensors = _load(self._folder(number) / _LABELS)
        return None if tensors is None else tensors["cluster"].clone()

    def save(self, number: int, index: int, fit: SliceFit) -> None:
        tensors = {field.name: getattr(fit, field.name) for field in fields(fit)}
        _save({name: value for name, value in tensors.items() if value is not None}, self._file(number, index))

    def load(self, number: int, index: int) -> SliceFit | None:
        """Tensors are views of the mapped file."""
        tensors = _load(self._file(number, index))
        return None if tensors is None else SliceFit(**tensors)

    def accept(self, number: int, objective: float) -> None:
        self._accepted = [*self._accepted[:number], objective]
        self._write_state()
        for earlier in range(number):
            shutil.rmtree(self._folder(earlier), ignore_errors=True)

    def accepted(self) -> list[float]:
        return self._accepted

    # --- files ----------------------------------------------------------------------------------------------------

    def _folder(self, number: int) -> Path:
        return self.path / f"pass-{number}"

    def _file(self, number: int, index: int) -> Path:
        return self._folder(number) / f"{index:05d}.safetensors"

    def _take_lock(self) -> None:
        # The folder itself is locked; one that was removed meanwhile by the process that held it is made again.
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and os.path.samestat(os.fstat(lock), os.stat(self.path)):
                    self._lock = lock
                    return
            except BlockingIOError:
                os.close(lock)
                raise JDLoRAError(f"{self._output}: another process is compressing into it; wait for it") from None
            os.close(lock)

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"recipe": None} if any(entry.suffix != ".new" for entry in self.path.iterdir()) else {}
        return state if isinstance(state, dict) else {"recipe": None}

    def _write_state(self) -> None:
        state = {"recipe": self._digest, "accepted": self._accepted, "temporary": self._temporary}
        with replacing(self.path / _STATE, durable=True) as new:
            new.write_text(json.dumps(state), encoding="utf-8")


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    with replacing(file, durable=True) as new:
        save_file({name: value.contiguous() for name, value in tensors.items()}, new)


def _load(file: Path) -> dict[str, Tensor] | None:
    """None where there is no readable file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
