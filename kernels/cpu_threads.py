"""The OpenMP threads that torch has, for code that numba compiles.

numba could make a pool of its own; two pools on the same cores wait for each other. So the kernel runs on the pool
that torch has made (and vLLM has bound to cores), through the entry point that compiled OpenMP code calls.
"""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_RUNTIME = re.compile(r"\s(/\S*lib(?:gomp|iomp5|omp)[^/\s]*\.so[^/\s]*)$", re.MULTILINE)


@lru_cache(maxsize=1)
def _runtime() -> ctypes.CDLL | None:
    """The OpenMP runtime in this process, of which torch's threads are; None where there is none that we know."""
    candidates: list[str | None] = [None]  # what is preloaded comes first, for torch as well
    if _MAPS.exists():
        candidates += dict.fromkeys(_RUNTIME.findall(_MAPS.read_text()))
    for name in candidates:
        # PyDLL: the call is shorter than handing the interpreter to another thread and waiting for it again.
        library = ctypes.PyDLL(name)
        if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_thread_num"):
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            library.omp_get_thread_num.restype = ctypes.c_int
            library.omp_get_thread_num.argtypes = []
            return library
    return None


def count() -> int:
    """Threads that `on_all` runs on."""
    return 1 if _runtime() is None else torch.get_num_threads()


def thread_number() -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    """A C function ``int()``: the number of the thread that calls it, from 0."""
    runtime = _runtime()
    return _first_thread if runtime is None else runtime.omp_get_thread_num


def on_all(function: int, data: int, threads: int) -> None:
    """Run the C function ``void(void *)`` at address ``function`` with ``data`` on so many threads."""
    if threads == 1:
        _of_address(function)(data)
    else:
        _runtime().GOMP_parallel(function, data, threads, 0)  # type: ignore[union-attr]


_first_thread = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


@lru_cache
def _of_address(function: int) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(function)
