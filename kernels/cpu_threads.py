"""The OpenMP threads that torch has, for code that numba compiles.

numba could make a pool of its own; two pools on the same cores wait for each other. So the kernel runs on the pool
that torch has made (and vLLM has bound to cores), through the entry point that compiled OpenMP code calls.
"""

from __future__ import annotations

import ctypes
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from numba.core import types

from vllm_jdlora.kernels.cpu_machine_code import address_of, outside

_MAPS, _TASKS = Path("/proc/self/maps"), Path("/proc/self/task")
_RUNTIME = re.compile(r"\s(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", re.MULTILINE)
_ON_ALL = (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def count() -> int:
    """Threads of torch's pool; 1 where its runtime is none that we know."""
    return 1 if _runtime() is None else torch.get_num_threads()


def thread_number() -> Any:
    """For compiled code, ``int()``: the number of the thread that calls it, from 0."""
    runtime = _runtime()
    function = _first if runtime is None else runtime.omp_get_thread_num
    return outside("jdlora_thread_number", address_of(function), types.int32())


def on_all() -> Any:
    """For compiled code, ``void(body, data, threads, 0)``: each thread runs ``body``, a ``void(void *)``, with
    ``data``."""
    runtime = _runtime()
    address = address_of(_alone if runtime is None else runtime.GOMP_parallel)
    signature = types.void(types.voidptr, types.voidptr, types.uint32, types.uint32)
    return outside("jdlora_on_all", address, signature)


def leave_core() -> None:
    """Let the calling thread run on every core that a thread of this process may run on.

    A new thread is bound to the core of the one that made it, which vLLM has bound to one.
    """
    if not _TASKS.exists():
        return
    cores: set[int] = set()
    for task in _TASKS.iterdir():
        with suppress(ProcessLookupError):  # ended meanwhile
            cores |= os.sched_getaffinity(int(task.name))
    os.sched_setaffinity(0, cores)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, of which torch's threads are; None where there is none that we know."""
    candidates: list[str | None] = [None]  # what is preloaded comes first, for torch as well
    if _MAPS.exists():
        found = set(_RUNTIME.findall(_MAPS.read_text()))
        # Torch's own first: other packages may have brought theirs.
        candidates += sorted(found, key=lambda path: ("/torch/" not in str(path), path))
    for name in candidates:
        library = ctypes.CDLL(name)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
            library.GOMP_parallel.restype, *library.GOMP_parallel.argtypes = _ON_ALL
            library.omp_get_thread_num.restype, library.omp_get_thread_num.argtypes = ctypes.c_int, []
            return library
    return None


@ctypes.CFUNCTYPE(ctypes.c_int)
def _first() -> int:
    return 0


@ctypes.CFUNCTYPE(*_ON_ALL)
def _alone(body: int, data: int, threads: int, flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)(data)
