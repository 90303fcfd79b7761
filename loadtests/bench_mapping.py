"""What a step's LoRA metadata costs in a worker, ours beside stock vLLM's (`make bench-mapping`).

Measured is the whole way from the model runner's `set_active_loras` to the finished metadata: which adapter each
request has, which are resident, and the plan that every layer reads. All adapters are resident; kernels and copies of
weights are not in it. Stock vLLM runs its own runner method, worker manager, LoRA manager and CPU punica wrapper and
knows only the adapters of the batch (its cost grows with those that it knows). Steps alternate between two batches, so
that none is skipped as unchanged, but in the row "repeated". One JSON line goes to `results/bench_mapping.jsonl`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench_conditions import conditions
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.v1.worker.gpu_input_batch import InputBatch
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from vllm_jdlora.evaluation.records import append_line
from vllm_jdlora.kernels.cpu_grouped import TokenGroups
from vllm_jdlora.kernels.token_tiles import TokenTiles
from vllm_jdlora.serving.collection_revisions import CollectionRevisions
from vllm_jdlora.serving.manager import JDLoRAModelManager
from vllm_jdlora.serving.options import AdapterPath
from vllm_jdlora.serving.scaling_buffer import ScalingBuffer
from vllm_jdlora.serving.step_requests import take_over
from vllm_jdlora.serving.worker_manager import JDWorkerLoRAManager

RESULTS = Path(__file__).parent / "results" / "bench_mapping.jsonl"
MOST_TOKENS, MOST_SEQUENCES, CLUSTERS = 8192, 256, 8
RANK, REVISION = 8, "r"
KNOWN = (8, 256, 100_000)
KERNEL_THREADS = 16
"""That a step's groups are dealt out to; the plan is made by one."""


@dataclass(frozen=True)
class Step:
    """`sequences` requests of as many tokens each, each with an adapter of its own while there are enough."""

    name: str
    sequences: int
    tokens: int
    repeated: bool = False


STEPS = (
    Step("decode, repeated", 256, 1, repeated=True),
    Step("decode, other requests", 256, 1),
    Step("prefill of 8,192 in 4", 4, 2048),
    Step("prefill of 8,192 in 256", 256, 32),
)


class Batch(InputBatch):
    """vLLM's input batch with what it says of LoRA alone."""

    def __init__(self, requests: list[LoRARequest]):
        self.request_lora_mapping = np.array([r.lora_int_id for r in requests], dtype=np.int64)
        self.lora_id_to_lora_request = {r.lora_int_id: r for r in requests}
        self._count = len(requests)

    @property
    def num_reqs(self) -> int:
        return self._count


def our_runner(requests: list[LoRARequest], plan: Callable[[np.ndarray, np.ndarray], Any]) -> LoRAModelRunnerMixin:
    """A runner that knows these adapters; those that a batch can have are resident."""
    entries = [SimpleNamespace(cluster=i % CLUSTERS) for i in range(len(requests))]
    collection: Any = SimpleNamespace(
        manifest=SimpleNamespace(rank=RANK, clusters=CLUSTERS, revision=REVISION, adapters=entries),
        sigma=lambda adapter: torch.zeros(1, RANK, RANK),
        index_of={request.lora_name: i for i, request in enumerate(requests)}.__getitem__,
    )
    slots = min(len(requests), MOST_SEQUENCES)
    scalings = ScalingBuffer(slots, 1, RANK, diagonal=False, dtype=torch.float32, device="cpu")
    layout: Any = SimpleNamespace(order=torch.tensor([0]), covered=torch.tensor([0]))
    scalings.lay_out(layout, RANK)
    manager = JDLoRAModelManager.__new__(JDLoRAModelManager)
    punica: Any = SimpleNamespace(update_tokens=plan)
    manager._punica = punica
    manager._set_up(CollectionRevisions(collection), scalings, CLUSTERS)
    manager._bases._write = lambda slot, base: 0  # nothing is brought: all bases are there
    manager._bases.load(CLUSTERS)
    for adapter, request in enumerate(requests):
        path = AdapterPath.parse(request.lora_path)
        assert path is not None
        manager.compressed.directory.bind(request, manager.compressed.revisions.adapter(path))
        if adapter < MOST_SEQUENCES:
            manager.compressed.activate(request.lora_int_id)
    runner = LoRAModelRunnerMixin()
    runner.lora_manager = JDWorkerLoRAManager.__new__(JDWorkerLoRAManager)
    runner.lora_manager._adapter_manager = manager
    runner.lora_manager._unreadable = {}
    take_over(runner)
    return runner


def stock_runner(requests: list[LoRARequest]) -> LoRAModelRunnerMixin:
    """vLLM's own, with these adapters registered and in slots."""
    manager = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_loras=len(requests), max_cpu_loras=len(requests))
    manager.supports_mm, manager._classification_head, manager.vocab_size = False, None, 32_000
    manager.lora_index_to_id = [r.lora_int_id for r in requests]
    manager._registered_adapters = AdapterLRUCache(len(requests), manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(len(requests), manager._deactivate_adapter)
    for request in requests:
        manager._registered_adapters[request.lora_int_id] = SimpleNamespace(id=request.lora_int_id)
        manager._active_adapters[request.lora_int_id] = None
    manager.punica_wrapper_mapping = {"language_model": PunicaWrapperCPU(MOST_TOKENS, MOST_SEQUENCES, "cpu")}
    manager._last_mapping = manager._last_slot_layout = None
    runner = LoRAModelRunnerMixin()
    runner.lora_manager = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
    runner.lora_manager._adapter_manager = manager
    return runner


def microseconds(runner: LoRAModelRunnerMixin, step: Step, requests: list[LoRARequest], repeats: int) -> list[float]:
    """Of each of `repeats` steps."""
    adapters = min(step.sequences, len(requests))
    who = [requests[i % adapters] for i in range(step.sequences)]
    batches = [Batch(who), Batch(who if step.repeated else who[1:] + who[:1])]
    tokens = [np.full(step.sequences, step.tokens, dtype=np.int32) for _ in batches]
    sampled = np.ones(step.sequences, dtype=np.int32)
    times = []
    for i in range(repeats + 4):
        start = time.perf_counter()
        runner.set_active_loras(batches[i % 2], tokens[i % 2], sampled)
        times.append(1e6 * (time.perf_counter() - start))
    return times[4:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300, help="steps of each kind (stock: a tenth)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiles = TokenTiles(MOST_TOKENS, CLUSTERS, "cpu")
    rows = []
    for known in KNOWN:
        paths = [AdapterPath(REVISION, i % CLUSTERS, f"a{i}") for i in range(known)]
        requests = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(paths)]
        for step in track(STEPS, description=f"{known:,} known adapters"):
            served = requests[: min(MOST_SEQUENCES, step.sequences)]
            for side, runner, repeats in (
                (
                    "ours, CPU plan",
                    our_runner(requests, partial(TokenGroups.plan, threads=KERNEL_THREADS)),
                    options.repeats,
                ),
                ("ours, GPU plan", our_runner(requests, tiles.plan), options.repeats),
                ("stock vLLM", stock_runner(served), max(5, options.repeats // 10)),
            ):
                times = microseconds(runner, step, requests, repeats)
                row = {"known": known, "step": step.name, "side": side}
                rows.append(row | {"min_us": round(min(times), 1), "median_us": round(statistics.median(times), 1)})
    record = {
        **conditions(),
        "threads": 1,
        "kernel_threads": KERNEL_THREADS,
        "clusters": CLUSTERS,
        "rows": rows,
    }
    append_line(options.results, record)
    sides = list(dict.fromkeys(row["side"] for row in rows))
    table = Table("known", "median µs (least)", *sides)
    for start in range(0, len(rows), len(sides)):
        together = rows[start : start + len(sides)]
        figures = (f"{row['median_us']:,.0f} ({row['min_us']:,.0f})" for row in together)
        table.add_row(f"{together[0]['known']:,}", together[0]["step"], *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
