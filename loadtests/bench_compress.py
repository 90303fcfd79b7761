"""Compression at scale: a thousand synthetic adapters of Mistral-7B shape on a small machine (`make bench-compress`).

Time by phase, peak memory, the fit's GFLOP/s beside the machine's own at the same shapes, and growth with the number
of adapters. Every run is a process of its own, so that each has its own peak. The adapters are generated on the fly,
one slice at a time (19 GB of them need not lie on a disk); generating stands in for reading and is timed apart. One
JSON line for each run is appended to `results/bench_compress.jsonl`.

    python loadtests/bench_compress.py --growth --clusters 25                          JD-Full of rank 16
    python loadtests/bench_compress.py --growth --clusters 8 --method diag --rank 64   JD-Diag
    python loadtests/bench_compress.py --growth --max-bytes 1/16 --method auto         as `jdlora compress` chooses
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

from bench_conditions import ROOT, commit, hardware, now

from vllm_jdlora.evaluation.records import append_line

RANK = 16
HIDDEN, KEY_VALUE = 4096, 1024
FAMILIES, SHARED = 25, 0.75
PHASES = ("generate", "stack", "choose", "assign", "fit", "energies", "measure", "write", "other")


class Clock:
    """Seconds by phase, by the clock and of processor time; a phase inside another one is not counted in the outer one,
    but for the choice, which is counted with all of it but generating.

    Where other processes want the cores too, processor time tells more.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cpu_seconds = dict.fromkeys(PHASES, 0.0)
        self._running = ["other"]
        self._since = time.monotonic(), time.process_time()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._lap()
        self._running.append("choose" if self._running[-1] == "choose" and name != "generate" else name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return inner

    def _lap(self) -> None:
        now = time.monotonic(), time.process_time()
        for seconds, end, since in zip((self.seconds, self.cpu_seconds), now, self._since, strict=True):
            seconds[self._running[-1]] += end - since
        self._since = now


class SyntheticAdapters:
    """n adapters of rank 16 on q (4096 → 4096), k and v (4096 → 1024) of every layer, values rounded to bf16.

    Each adapter belongs to one of 25 families (number modulo 25). In each slice a family has two random orthonormal
    16-dimensional subspaces; a factor is 3/4 (of its energy) a random combination of its family's directions and 1/4
    white noise, so about 0.56 of an adapter's energy can be captured by 25 clusters of rank 16 (relative error 0.66),
    less by 8 that must share. A slice is drawn from a generator seeded by its number: every reading gives the same.
    """

    def __init__(self, n: int, layers: int):
        self.n = n
        self.slice_names = [
            f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(layers) for kind in ("q", "k", "v")
        ]

    def width(self, index: int) -> int:
        """d_out of a slice."""
        return KEY_VALUE if index % 3 else HIDDEN

    def factors(self, index: int) -> list[Any]:
        import torch

        from vllm_jdlora.jd.problem import Factors

        draw = torch.Generator().manual_seed(index)
        sides = [
            torch.linalg.qr(torch.randn(FAMILIES, size, RANK, generator=draw)).Q.mT
            for size in (self.width(index), HIDDEN)
        ]
        factors: list[Any] = []
        for first in range(0, self.n, FAMILIES):
            count = min(FAMILIES, self.n - first)
            stacks = []
            for basis in sides:
                mix = torch.randn(FAMILIES, RANK, RANK, generator=draw).mul_((SHARED / RANK) ** 0.5)
                noise = torch.randn(FAMILIES, RANK, basis.shape[2], generator=draw)
                stack = noise.mul_(((1 - SHARED) / basis.shape[2]) ** 0.5).baddbmm_(mix, basis)
                stacks.append(stack.bfloat16().float())
            factors += [Factors(b.T, a) for b, a in zip(stacks[0][:count], stacks[1][:count], strict=True)]
        return factors


@dataclass(frozen=True)
class Spec:
    """One compression: a size, or the bytes to choose it for."""

    adapters: int
    layers: int
    method: str
    rank: int
    clusters: int
    max_bytes: str | None
    threads: int


def compress_once(spec: Spec, folder: Path) -> dict[str, Any]:
    """One whole compression: choice, assignment, passes with a work folder, files put together."""
    import torch

    from vllm_jdlora.adapter import SliceShape
    from vllm_jdlora.collection import work
    from vllm_jdlora.collection.tensors import write_tensors
    from vllm_jdlora.commands.terminal import progress_bars
    from vllm_jdlora.jd import clustering, slice_fit
    from vllm_jdlora.jd.problem import SliceProblem

    torch.set_num_threads(spec.threads)
    clock = Clock()
    n, layers = spec.adapters, spec.layers
    source = SyntheticAdapters(n, layers)
    source.factors = clock.timed("generate", source.factors)  # type: ignore[method-assign]
    SliceProblem.from_factors = staticmethod(clock.timed("stack", SliceProblem.from_factors))  # type: ignore[method-assign]
    SliceProblem.subset = clock.timed("stack", SliceProblem.subset)  # type: ignore[method-assign]
    clustering.assignment = clock.timed("assign", clustering.assignment)
    fitted = Fits(slice_fit.fit_full)
    slice_fit.fit_full = fitted
    slice_fit.METHODS = {
        name: replace(
            method,
            fit=clock.timed("fit", method.fit),
            refit=clock.timed("measure", method.refit),
            captured=clock.timed("energies", method.captured),
        )
        for name, method in slice_fit.METHODS.items()
    }
    slice_fit.squared_errors = clock.timed("measure", slice_fit.squared_errors)
    work.WorkFolder.save = clock.timed("write", work.WorkFolder.save)  # type: ignore[method-assign]

    shapes = [SliceShape(name, source.width(m), HIDDEN) for m, name in enumerate(source.slice_names)]
    output = folder / "collection"
    with progress_bars() as show, work.WorkFolder(output, "bench") as store:
        output.mkdir()
        store.open(output)
        slices = clustering.weighted_slices(source, None, 0)
        size, predicted = (spec.method, spec.rank, spec.clusters), None
        if spec.max_bytes is not None:
            with clock.phase("choose"):
                choice = choose(slices, shapes, spec, show)
            size, predicted = (choice.method, choice.rank, choice.clusters), choice.mean_error
            print(
                f"chosen: {size}, relative error {predicted:.3f}, {clock.cpu_seconds['choose']:.0f} s", file=sys.stderr
            )
        method, rank, clusters = size
        recipe = slice_fit.SliceRecipe(rank, method, torch.Tensor.bfloat16, torch.bfloat16)
        fit = clustering.fit_collection(source, recipe, clusters=clusters, store=store, slices=slices, progress=show)
        with clock.phase("write"):
            write_tensors(output, shapes, fit, range(n), torch.arange(clusters), "none", show)
    relative = (fit.squared_error.sum(1) / fit.squared_norm.sum(1)).sqrt()
    seconds, cpu = (
        {name: round(value, 2) for name, value in each.items()} for each in (clock.seconds, clock.cpu_seconds)
    )
    return {
        "adapters": n,
        "layers": layers,
        "method": method,
        "clusters": clusters,
        "rank": rank,
        "max_bytes": spec.max_bytes,
        "predicted_relative_error": predicted and round(predicted, 4),
        "threads": spec.threads,
        "nice": os.nice(0),
        "passes": fit.passes,
        "objective": fit.objective,
        "mean_relative_error": round(float(relative.mean()), 4),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "seconds_without_generating": round(sum(seconds.values()) - seconds["generate"], 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "collection_mib": round(sum(file.stat().st_size for file in output.iterdir()) / 2**20, 1),
        "fit_gflops": round(fitted.flops / max(clock.seconds["fit"], 1e-9) / 1e9, 1) if fitted.calls else None,
        "fit_sweeps": round(fitted.sweeps / max(fitted.calls, 1), 1) if fitted.calls else None,
        "gemm_gflops": gemm_rates(n * RANK // clusters),
    }


def choose(slices: Any, shapes: Any, spec: Spec, show: Any) -> Any:
    """The `Choice` that `jdlora compress --max-bytes` makes."""
    from vllm_jdlora.commands.byte_budget import byte_budget
    from vllm_jdlora.jd.budget import Sizes
    from vllm_jdlora.jd.byte_choice import cheapest_loss

    assert spec.max_bytes is not None
    sides = tuple((part.d_out, part.d_in) for part in shapes)
    sizes = Sizes(slices=sides, plain=(2 * RANK * sum(map(sum, sides)),) * spec.adapters)
    methods = ("full", "diag") if spec.method == "auto" else (spec.method,)
    both = {method: replace(sizes, diagonal=method == "diag") for method in methods}
    return cheapest_loss(slices, both, byte_budget(spec.max_bytes).of(sizes.uncompressed), progress=show)


class Fits:
    """`fit_full` with its products with the stacks counted (QR and small products are not)."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call
        self.calls = self.sweeps = 0
        self.flops = 0.0

    def __call__(self, problem: Any, rank: int, **options: Any) -> Any:
        fit = self._call(problem, rank, **options)
        rows, d_out, d_in = problem.rows, problem.bt.shape[1], problem.a.shape[1]
        width, sweeps = rank + max(8, rank // 2), len(fit.captured) - 1
        range_finder = 5 * 2 * rows * (2 * (d_out + d_in) * width + RANK * d_out)
        start = 2 * rows * (d_out + 2 * d_in) * rank
        self.flops += range_finder + start + sweeps * 4 * rows * (d_out + d_in) * rank
        self.calls += 1
        self.sweeps += sweeps
        return fit


def gemm_rates(rows: int) -> dict[str, float]:
    """GFLOP/s of fp32 products: a cluster's rows with a basis, the transposed one, and a square one for comparison."""
    import torch

    stack, basis, product = torch.randn(rows, HIDDEN), torch.randn(HIDDEN, RANK), torch.randn(rows, RANK)
    square = torch.randn(2048, 2048)
    pairs = {"rows_by_basis": (stack, basis), "transposed": (stack.T, product), "square": (square, square)}
    rates = {}
    for name, (left, right) in pairs.items():
        best = float("inf")
        for _ in range(8):
            start = time.monotonic()
            left @ right
            best = min(best, time.monotonic() - start)
        rates[name] = round(2 * left.shape[0] * left.shape[1] * right.shape[1] / best / 1e9, 1)
    return rates


def run(options: argparse.Namespace, n: int, layers: int, clusters: int, kind: str) -> dict[str, Any]:
    """One compression in a process of its own; its record, appended to the results."""
    spec = Spec(n, layers, options.method, options.rank, clusters, options.max_bytes, options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, __file__, "--one", json.dumps([asdict(spec), folder])]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    record = {"kind": kind, **json.loads(done.stdout), "machine": machine()}
    append_line(options.output, record)
    phases = "  ".join(f"{name} {seconds:.0f}" for name, seconds in record["seconds"].items() if seconds >= 0.5)
    cpu = "  ".join(f"{name} {seconds:.0f}" for name, seconds in record["cpu_seconds"].items() if seconds >= 0.5)
    print(
        f"n {n:5d}  JD-{record['method']}  R {record['rank']}  K {record['clusters']:3d}  {3 * layers:3d} slices  "
        f"{record['passes']} passes: "
        f"{record['seconds_without_generating']:7.1f} s beside generating, {record['peak_gib']:.2f} GiB peak, "
        f"fit {record['fit_gflops'] or '-'} of {record['gemm_gflops']['rows_by_basis']} GFLOP/s, "
        f"relative error {record['mean_relative_error']:.3f}\n    seconds: {phases}\n    of a core: {cpu}",
        flush=True,
    )
    return record


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    load = round(os.getloadavg()[0], 1)
    return {"time": now(), "commit": commit(), **hardware(), "load": load, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=32, help="of three slices each")
    parser.add_argument("--method", choices=["full", "diag", "auto"], default="full", help="auto: with --max-bytes")
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--clusters", type=int, nargs="*", help="one run for each number (default: 8 25)")
    parser.add_argument("--max-bytes", metavar="B", help="choose method, rank and clusters for these bytes (1/16)")
    parser.add_argument("--growth", type=int, nargs="*", default=[125, 250, 500, 1000], help="numbers of adapters")
    parser.add_argument("--growth-layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the collections (about 2 GB each, removed again)")
    parser.add_argument("--output", type=Path, default=ROOT / "loadtests" / "results" / "bench_compress.jsonl")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        spec, folder = json.loads(options.one)
        print(json.dumps(compress_once(Spec(**spec), Path(folder))))
        return
    if (options.method == "auto") > (options.max_bytes is not None):
        parser.error("--method auto is a choice for --max-bytes")
    for n in options.growth:
        run(options, n, options.growth_layers, 8, "growth")
    sizes = [0] if options.max_bytes else [8, 25]  # with a budget the number of clusters is chosen
    for clusters in sizes if options.clusters is None else options.clusters:
        run(options, options.adapters, options.layers, clusters, "whole")


if __name__ == "__main__":
    main()
