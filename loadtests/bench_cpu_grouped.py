"""The CPU kernel beside other forms of the same linear, module by module (`make bench-cpu-grouped`).

Bases are read from memory: before each call as much is read and written as a layer's base weights have, so that
nothing stays in the cache that would not in a server. Forms: the kernel in each form that this processor runs; one
product with the V of all clusters and a pick; one product for each cluster in the batch (both by torch, in the dtype of
the bases). One JSON line is appended to `results/bench_cpu_grouped.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_conditions import conditions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_jdlora.evaluation.records import append_line
from vllm_jdlora.kernels import cpu_threads
from vllm_jdlora.kernels.cpu_grouped import PackedLinear, TokenGroups
from vllm_jdlora.kernels.cpu_layout import Form

RESULTS = Path(__file__).parent / "results" / "bench_cpu_grouped.jsonl"
ADAPTERS, RANK = 1000, 16
# Copies of a module, as a model has layers: together they outgrow the cache.
LAYERS = 30


@dataclass(frozen=True)
class Module:
    """A linear module of SmolLM2-135M: d_out of its slices, d_in."""

    name: str
    widths: tuple[int, ...]
    d_in: int

    @property
    def weights(self) -> int:
        """Bytes of the base weight in bf16."""
        return 2 * sum(self.widths) * self.d_in


MODULES = (
    Module("qkv_proj", (576, 192, 192), 576),
    Module("o_proj", (576,), 576),
    Module("gate_up_proj", (1536, 1536), 576),
    Module("down_proj", (576,), 1536),
)
Run = Callable[[torch.Tensor, torch.Tensor], None]


def batch_of(tokens: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster and slot of each token: up to 32 tokens have an adapter each, more are prompts of 512."""
    random = np.random.default_rng(0)
    sequences = tokens if tokens <= 32 else tokens // 512
    slots = np.repeat(random.choice(ADAPTERS, sequences, replace=False), tokens // sequences)
    return random.integers(0, clusters, ADAPTERS)[slots], slots


def kernel(module: Module, form: Form, clusters: int, token_cluster: np.ndarray, token_slot: np.ndarray) -> Run:
    sigma = torch.randn(ADAPTERS, len(module.widths), RANK, RANK).to(form.stored).mT
    linear = PackedLinear(module.widths, module.d_in, RANK, clusters, form, sigma)
    groups = TokenGroups.plan(token_cluster, token_slot)
    for cluster in range(clusters):
        linear.write(
            cluster,
            [torch.randn(width, RANK) / 100 for width in module.widths],
            [torch.randn(RANK, module.d_in) / 100 for _ in module.widths],
        )
    return lambda y, x: linear.add_(y, x, groups)


def by_torch(
    module: Module, dense: bool, dtype: torch.dtype, clusters: int, token_cluster: np.ndarray, token_slot: np.ndarray
) -> Run:
    """Shrink as one product over all clusters and a pick, or as one for each; Σ as one batched product; expand as one
    product for each cluster and slice."""
    slices = len(module.widths)
    v = (torch.randn(clusters, slices * RANK, module.d_in) / 100).to(dtype)
    u = [(torch.randn(clusters, width, RANK) / 100).to(dtype) for width in module.widths]
    sigma = torch.randn(ADAPTERS, slices, RANK, RANK).to(dtype)
    order = torch.from_numpy(np.argsort(token_cluster, kind="stable"))
    cluster = torch.from_numpy(token_cluster)[order]
    gathered = sigma[torch.from_numpy(token_slot)[order]]
    present, counts = torch.unique_consecutive(cluster, return_counts=True)
    stops = counts.cumsum(0).tolist()
    runs = list(zip(present.tolist(), [0, *stops[:-1]], stops, strict=True))

    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        rows = x[order]
        if dense:
            everything = (rows @ v.flatten(0, 1).T).view(len(rows), clusters, -1)
            h = everything[torch.arange(len(rows)), cluster]
        else:
            h = torch.cat([rows[start:stop] @ v[k].T for k, start, stop in runs])
        g = (gathered @ h.view(-1, slices, RANK, 1))[..., 0]
        out = y[order]
        column = 0
        for i, width in enumerate(module.widths):
            for k, start, stop in runs:
                out[start:stop, column : column + width].addmm_(g[start:stop, i], u[i][k].T)
            column += width
        y[order] = out

    return run


def forms(dtype: torch.dtype) -> dict[str, Form]:
    """Those that this processor runs, by name."""
    here = Form.here(dtype)
    found = {"kernel": here}
    if here.pairs:
        found["kernel without bf16 pairs"] = Form(dtype, False, here.lanes)
    if here.lanes > 8:
        found["kernel in AVX2's registers"] = Form(dtype, False, 8)
    return found


def seconds_of(runs: list[Run], module: Module, tokens: int, dtype: torch.dtype, rounds: int) -> float:
    """Median over rounds of the mean over layers of one call, bases in memory and x, y in the cache."""
    x = torch.randn(tokens, module.d_in).to(dtype)
    y = torch.randn(tokens, sum(module.widths)).to(dtype)
    weights = torch.zeros(module.weights, dtype=torch.uint8)
    means = []
    for _ in range(rounds + 1):
        total = 0.0
        for run in runs:
            weights.add_(1)
            y.add_(0)
            x.add_(0)
            start = time.perf_counter()
            run(y, x)
            total += time.perf_counter() - start
        means.append(total / len(runs))
    return statistics.median(means[1:])


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Module, int, int, Callable[..., Run]]]:
    for module in MODULES:
        for clusters in (8, 128):
            for tokens in (1, 32, 2048):
                for name, form in forms(dtype).items():
                    yield name, module, clusters, tokens, lambda *batch, m=module, f=form: kernel(m, f, *batch)
                for name, dense in (("all clusters, then a pick", True), ("each cluster", False)):
                    if not (dense and clusters * tokens > 1 << 14):  # hundreds of MB of zeros
                        yield (
                            name, module, clusters, tokens,
                            lambda *batch, m=module, d=dense: by_torch(m, d, dtype, *batch),
                        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--json", action="store_true", help="the record on stdout")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    rows = []
    for name, module, clusters, tokens, made in track(list(cases(dtype)), "measure", disable=args.json):
        batch = batch_of(tokens, clusters)
        runs = [made(clusters, *batch) for _ in range(args.layers)]
        seconds = seconds_of(runs, module, tokens, dtype, args.rounds)
        rows.append(
            {"form": name, "module": module.name, "clusters": clusters, "tokens": tokens,
             "microseconds": round(seconds * 1e6, 1)}
        )  # fmt: skip
    record = {
        **conditions(),
        "dtype": args.dtype,
        "rank": RANK,
        "threads": cpu_threads.count(),
        "layers": args.layers,
        "rows": rows,
    }
    append_line(args.results, record)
    if args.json:
        print(json.dumps(record))
    else:
        show(rows, f"µs a layer, rank {RANK}, {args.dtype}, {record['threads']} threads, bases read from memory")


def show(rows: list[dict], title: str) -> None:
    names = list(dict.fromkeys(row["form"] for row in rows))
    table = Table(title=title)
    for column in ("module", "clusters", "tokens", *names):
        table.add_column(column, justify="left" if column == "module" else "right")
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["module"], row["clusters"], row["tokens"]), {})[row["form"]] = row["microseconds"]
    for (module, clusters, tokens), by_form in found.items():
        cells = [f"{by_form[name]:.0f}" if name in by_form else "–" for name in names]
        table.add_row(module, str(clusters), str(tokens), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
