"""Under which conditions a measurement was made: machine, versions, commit, and the defaults that follow from them."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def conditions() -> dict[str, Any]:
    """What every record of results begins with."""
    return {"time": now(), "commit": commit(), "hardware": hardware(), "versions": versions()}


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def hardware() -> dict[str, Any]:
    """Processor, its cores and those that this process may use, and the CPU features that decide about bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines()) if k.strip()}
    flags = set(fields.get("flags", "").split())
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "features": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags],
    }


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("vllm", "torch", "vllm-jdlora")}


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--dtype``; None stands for the defaults below."""
    parser.add_argument("--model", type=Path, help="base model folder (default: the demo's, prepared if need be)")
    parser.add_argument("--dtype", help="default: bfloat16 where the CPU has it, else float32")


def default_dtype() -> str:
    from vllm_jdlora.demo.environment import cpu_dtype

    return cpu_dtype(set(hardware()["features"]))


def default_model() -> Path:
    from vllm_jdlora.demo.base_model import prepare_base_model

    return prepare_base_model()


def available_bytes() -> int:
    """Memory that new processes can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
