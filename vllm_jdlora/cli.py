"""The `jdlora` command. Exit codes: 0 good, 1 a check failed, 2 usage or bad input."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_jdlora.errors import JDLoRAError

if TYPE_CHECKING:
    from vllm_jdlora.collection import Collection

# torch and everything that needs it is imported inside the commands: `jdlora --help` answers at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except JDLoRAError as error:
        print(f"jdlora: {_printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jdlora: stopped; nothing was left behind", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jdlora", description="Compress collections of LoRA adapters by joint diagonalisation and look into them."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("vllm-jdlora"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compress(commands)
    _add_inspect(commands)
    _add_validate(commands)
    _add_export(commands)
    _add_demo(commands)
    return parser


# --- compress ---------------------------------------------------------------------------------------------------------


def _add_compress(commands: Any) -> None:
    parser = commands.add_parser("compress", help="compress PEFT adapters of one base model into a collection")
    parser.add_argument("adapters", nargs="+", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="COLLECTION", help="folder to create")
    parser.add_argument("--method", choices=["full"], default="full", help="JD-Full: a full [R, R] matrix per adapter")
    parser.add_argument("--rank", type=_positive, metavar="R", help="columns of each basis (default: the paper's rule)")
    parser.add_argument(
        "--clusters", type=_clusters, metavar="K|auto", help="groups of adapters that share bases (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the clustering's starts (default: 0)")
    parser.add_argument(
        "--max-error", type=float, metavar="E", help="keep adapters with a larger relative error uncompressed"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="on disk (default: bf16)")
    parser.add_argument("--base-model", metavar="M", help="name or folder; adapters of another model are refused")
    parser.add_argument("--skip-bad", action="store_true", help="leave out adapters that cannot be read, and list them")
    parser.add_argument("--force", action="store_true", help="replace COLLECTION if it exists")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    parser.set_defaults(run=_compress)


def _compress(args: argparse.Namespace) -> int:
    from vllm_jdlora.adapter import read_adapters
    from vllm_jdlora.collection.base_model import of_one_base_model
    from vllm_jdlora.collection.build import compress

    if args.max_error is not None and not 0 <= args.max_error <= 1:
        raise JDLoRAError(f"--max-error is a relative error between 0 and 1, not {args.max_error:g}")
    if args.output.exists() and not args.force:
        # Told now rather than after the work.
        raise JDLoRAError(f"{args.output}: exists already; choose another name or give --force to replace it")
    with _progress() as show:
        show("read adapters", 0, 1)
        adapters, skipped = read_adapters(args.adapters, skip_bad=args.skip_bad)
        if args.skip_bad:
            adapters, others, _ = of_one_base_model(adapters, args.base_model, skip_others=True)
            skipped = sorted([*skipped, *others])
        show("read adapters", 1, 1)
        collection = compress(
            adapters,
            args.output,
            rank=args.rank,
            clusters=args.clusters,
            seed=args.seed,
            max_error=args.max_error,
            dtype=args.dtype,
            base_model=args.base_model,
            force=args.force,
            skipped=skipped,
            progress=show,
        )
    _report(collection, args.json)
    return 0


# --- inspect, validate, export ----------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser("inspect", help="sizes, clusters and the error of each adapter")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection

    _report(Collection.open(args.collection, verify=False), args.json)
    return 0


def _add_validate(commands: Any) -> None:
    parser = commands.add_parser("validate", help="read every byte and compare digests; exit code 1 if damaged")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    parser.set_defaults(run=_validate)


def _validate(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection

    try:
        collection = Collection.open(args.collection, verify=True)
    except JDLoRAError as error:
        if args.json:
            print(json.dumps({"valid": False, "problem": str(error)}))
        else:
            print(f"jdlora: {_printable(str(error))}", file=sys.stderr)
        return 1
    n = len(collection.manifest.adapters)
    if args.json:
        print(json.dumps({"valid": True, "adapters": n, "revision": collection.manifest.revision}))
    else:
        print(f"{args.collection}: valid, {n} compressed adapters, revision {collection.manifest.revision}")
    return 0


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="one compressed adapter as a PEFT adapter of rank R")
    parser.add_argument("collection", type=Path, metavar="COLLECTION")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="fp32", help="default: fp32")
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from vllm_jdlora.collection import Collection
    from vllm_jdlora.collection.export import export_adapter

    collection = Collection.open(args.collection)
    export_adapter(collection, args.name, args.output, dtype=args.dtype, force=args.force)
    print(f"{args.output}: {args.name} as a PEFT adapter of rank {collection.manifest.rank}")
    return 0


# --- demo -------------------------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="compress eight real adapters, serve them, compare their answers")
    parser.add_argument("--adapters", type=Path, help="default: the repository's demo/adapters")
    parser.add_argument("--cache-dir", type=Path, help="default: $XDG_CACHE_HOME/vllm-jdlora")
    parser.add_argument("--port", type=int, help="default: 8000, or a free one where it is taken")
    parser.add_argument("--stay", action="store_true", help="leave the server running until Ctrl-C")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    try:
        from vllm_jdlora.demo.cli import run
    except ImportError as error:
        raise JDLoRAError(
            f"the demo needs {error.name}: `make demo`, or install vllm-jdlora[demo] and a vLLM"
        ) from None
    return int(run(args))


# --- reports ----------------------------------------------------------------------------------------------------------


def summary(collection: Collection) -> dict[str, Any]:
    """What `inspect --json` prints: the manifest, sizes in bytes, and the errors beside every ratio."""
    manifest = collection.manifest
    errors = [a.relative_error for a in manifest.adapters]
    # Adapters as files are 2 bytes a number; so is the collection unless it was asked for in fp32.
    original = 2 * sum(a.parameters for a in manifest.adapters)
    size = collection.size_in_bytes()
    width = 4 if manifest.dtype == "fp32" else 2
    return {
        **{k: v for k, v in asdict(manifest).items() if k not in ("slices", "files")},
        "slices": len(manifest.slices),
        "bytes": {
            "collection": size,
            "adapters_in_bf16": original,
            "one_scaling": len(manifest.slices) * manifest.rank**2 * width,
        },
        "compression_ratio": original / size,
        "relative_error": {"mean": sum(errors) / len(errors), "max": max(errors)},
    }


def _report(collection: Collection, as_json: bool) -> None:
    facts = summary(collection)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    size, error = facts["bytes"], facts["relative_error"]
    # Names and reasons come from outside: never markup, never control characters.
    show = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    show(
        Text(_printable(str(collection.path)), "bold"),
        _printable(f" base model {facts['base_model']['name'] or 'unknown'}, revision {facts['revision']}"),
    )
    show(
        f"{len(facts['adapters'])} compressed adapters: rank {facts['rank']}, {facts['clusters']} clusters, "
        f"{facts['slices']} slices, {facts['dtype']}; {_bytes(size['collection'])} for "
        f"{_bytes(size['adapters_in_bf16'])} of adapters, {facts['compression_ratio']:.1f} times smaller at a relative "
        f"error of {error['mean']:.3f} (mean), {error['max']:.3f} (max); {_bytes(size['one_scaling'])} for each "
        "further adapter"
    )
    table = Table("adapter", "cluster", "relative error", "ρ", box=None)
    for entry in sorted(facts["adapters"], key=lambda a: (a["cluster"], a["name"])):
        table.add_row(Text(entry["name"]), str(entry["cluster"]), f"{entry['relative_error']:.3f}", str(entry["rank"]))
    for entry in facts["plain"]:
        table.add_row(Text(entry["name"]), "plain", "0", str(entry["rank"]))
    console.print(table)
    for entry in facts["plain"]:
        show(_printable(f"plain: {entry['name']}: {entry['reason']}"))
    for entry in facts["skipped"]:
        show(_printable(f"skipped: {entry['name']}: {entry['reason']}"))


def _printable(text: str) -> str:
    """One line without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage on stderr, called as (stage, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield show


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _clusters(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


if __name__ == "__main__":
    sys.exit(main())
