"""What the demonstration runs on: versions, device and number format, checked before anything takes time."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_jdlora.errors import JDLoRAError

_NEEDS_GIB = 4.0
"""Measured on the CPU: resident 3.1 GiB over the three processes of the server with the demo model."""


@dataclass(frozen=True)
class Environment:
    """``device`` is ``cpu`` or ``cuda``; ``dtype`` what ``vllm serve --dtype`` gets."""

    device: str
    dtype: str
    summary: str


def check_environment() -> Environment:
    """The environment to serve in.

    Raises:
        JDLoRAError: something needed is missing, with what to do.
    """
    for name in ("vllm", "transformers", "peft", "gguf"):
        if _version(name) is None:
            raise JDLoRAError(f"the demo needs the package {name}, which is not installed: run `make setup`")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "jdlora" not in allowed.split(","):
        raise JDLoRAError("VLLM_PLUGINS hides this plugin from vLLM: add jdlora to it, or unset it")
    available = _available_gib()
    if available is not None and available < _NEEDS_GIB:
        raise JDLoRAError(f"{available:.1f} GiB of memory are free and the demo needs {_NEEDS_GIB:.0f}: free some")
    device, dtype, hardware = _device()
    parts = [f"Python {platform.python_version()}", f"vLLM {_version('vllm')}", f"torch {_version('torch')}", hardware]
    return Environment(device, dtype, ", ".join([*parts, dtype]))


def cpu_dtype(flags: set[str]) -> str:
    """bf16 where the CPU multiplies it; vLLM emulates it elsewhere, slower than fp32. ``flags`` as in /proc/cpuinfo."""
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def _device() -> tuple[str, str, str]:
    """(device, dtype, words)"""
    import torch

    if torch.cuda.is_available():
        return "cuda", "bfloat16" if torch.cuda.is_bf16_supported() else "float16", torch.cuda.get_device_name()
    return "cpu", cpu_dtype(_cpu_flags()), f"{len(os.sched_getaffinity(0))} CPU cores"


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith(("flags", "Features"))), set())


def _available_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration, ValueError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
