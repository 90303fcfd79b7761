"""The `jdlora` command. Exit codes: 0 good, 1 a check failed, 2 usage or bad input."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from vllm_jdlora.commands import (
    add,
    calibrate,
    compress,
    demo,
    diff,
    distill,
    evaluate,
    export,
    import_lora_xs,
    inspect,
    plan,
    pull,
    push,
    refresh,
    remove,
    study,
    train,
    truncate,
    validate,
)
from vllm_jdlora.commands.terminal import printable
from vllm_jdlora.errors import JDLoRAError

_COMMANDS = (
    compress,
    plan,
    calibrate,
    inspect,
    validate,
    export,
    push,
    pull,
    add,
    remove,
    diff,
    refresh,
    distill,
    import_lora_xs,
    evaluate,
    study,
    train,
    truncate,
    demo,
)
"""Modules that each add one command. They import torch inside the command: `jdlora --help` answers at once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except JDLoRAError as error:
        print(f"jdlora: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of what is printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path that nobody can open, a full disk beneath what is printed
        where = f"{error.filename}: " if error.filename else ""
        print(f"jdlora: {printable(f'{where}{error.strerror or error}')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"jdlora: {'; '.join(getattr(stop, '__notes__', ['stopped; nothing was left behind']))}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jdlora", description="Compress collections of LoRA adapters by joint diagonalisation and look into them."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("vllm-jdlora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
