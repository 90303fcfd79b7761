"""Where the record of a benchmark goes: flags, the line that is appended, its picture, and that picture drawn anew."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.evaluation.records import append_line


def add_flags(parser: argparse.ArgumentParser, results: Path, picture: Path) -> None:
    """``--results`` and ``--plot`` with these defaults, for :func:`keep`."""
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--plot", nargs="?", type=Path, const=picture, help="draw the record")


def keep(record: dict[str, Any], args: argparse.Namespace, draw: Callable[[Path], Path]) -> None:
    """Append the record, and draw it where that was asked for. draw: into a file, which it returns."""
    append_line(args.results, record)
    print(f"appended to {args.results}")
    if args.plot:
        print(f"drawn in {draw(args.plot)}")


def draw_anew(description: str | None, results: Path, picture: Path, draw: Callable[[Path, Path], Path]) -> None:
    """The command that draws what is on record. draw: from results into a file, which it returns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("-o", "--output", type=Path, default=picture)
    args = parser.parse_args()
    try:
        print(f"drawn in {draw(args.results, args.output)}")
    except JDLoRAError as error:
        parser.error(str(error))
