"""`jdlora demo`: compress eight real adapters, serve them, compare their answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError


def add_to(commands: Any) -> None:
    parser = commands.add_parser("demo", help="compress eight real adapters, serve them, compare their answers")
    parser.add_argument("--adapters", type=Path, help="default: the repository's demo/adapters")
    parser.add_argument("--cache-dir", type=Path, help="default: $XDG_CACHE_HOME/vllm-jdlora")
    parser.add_argument("--port", type=int, help="default: 8000, or a free one where it is taken")
    parser.add_argument("--stay", action="store_true", help="leave the server running until Ctrl-C")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    try:
        from vllm_jdlora.demo.cli import run
    except ImportError as error:
        raise JDLoRAError(
            f"the demo needs {error.name}: `make demo`, or install vllm-jdlora[demo] and a vLLM"
        ) from None
    return int(run(args))
