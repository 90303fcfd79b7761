"""Time of one packed module with adapters on a GPU: base product, vLLM's kernels, ours. Run by ``gpu_check.py``.

Every condition is captured in a CUDA graph and replayed behind a write that empties L2 and keeps the stream busy while
the CPU enqueues, so neither the cache nor the launch from Python is timed. Medians.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from vllm_jdlora.kernels import traffic
from vllm_jdlora.kernels.gpu_problem import Problem, make_problem
from vllm_jdlora.kernels.token_tiles import DECODE_ROWS
from vllm_jdlora.kernels.traffic import MISTRAL_7B, ModuleShape

ALL = {"tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "clusters": (1, 4, 16, 64, 128), "ranks": (8, 16, 32, 64)}
QUICK = {"tokens": (1, 32, 256), "clusters": (1, 16, 128), "ranks": (16, 64)}
STOCK_RANK = 16  # of the uncompressed adapters, the paper's
_L2_BYTES = 256 << 20
_REPEATS = 30

Timer = Callable[[Callable[[], Any]], float]


class GraphTimer:
    """Microseconds of a function's launches in a CUDA graph, with a cold L2."""

    def __init__(self) -> None:
        self._flush = torch.empty(_L2_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, run: Callable[[], Any]) -> float:
        run()  # compiles before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(_REPEATS):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3)
        return statistics.median(times)


def benchmark(
    *,
    quick: bool = False,
    shapes: Mapping[str, ModuleShape] = MISTRAL_7B,
    sizes: Mapping[str, Sequence[int]] | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    timer: Timer | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each condition, as it is measured: who ran, µs, bytes that had to move, and GB/s of them.

    Rows named ``ours`` are compressed adapters, all distinct in the batch, in the form that serving chooses; for small
    batches both forms, ``ours, by cluster`` and ``ours, all clusters``, stand beside it; ``ours, int8`` and ``ours,
    fp8`` have bases of 8 bits. ``ours, uncompressed`` are the same kernels on rank-16 adapters without shared bases;
    ``vllm, equal memory`` vLLM's kernels with as many rank-16 slots as take the memory of our bases (of 16 bits) and
    the batch's scalings, tokens spread over them.
    """
    sizes = sizes or (QUICK if quick else ALL)
    timer = timer or GraphTimer()
    facts = conditions(device, timer)
    for name, shape in shapes.items():
        for tokens in sizes["tokens"]:
            for row in _module(shape, tokens, sizes, device, dtype, timer):
                rate = row["bytes"] / row["microseconds"] / 1e3
                shared = {"module": name, "tokens": tokens, "gb_per_s": rate}
                yield facts | shared | row | {"share_of_copy": rate / facts["copy_gb_per_s"]}


def conditions(device: str, timer: Timer) -> dict[str, Any]:
    """The card, its versions, and the bandwidth that a large copy reaches."""
    import triton

    name, copied = ("interpreter", 1 << 12) if device == "cpu" else (torch.cuda.get_device_name(), 1 << 30)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timer(lambda: target.copy_(source))
    return {
        "card": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": _version_of_vllm(),
        "power_limit": _power_limit(),
        "copy_gb_per_s": 2 * copied / seconds / 1e3,
    }


def _module(
    shape: ModuleShape,
    tokens: int,
    sizes: Mapping[str, Sequence[int]],
    device: str,
    dtype: torch.dtype,
    timer: Timer,
) -> Iterator[dict[str, Any]]:
    card = _modelled(device)
    x = torch.randn(tokens, shape.d_in, device=device).to(dtype)
    weight = torch.randn(shape.d_out, shape.d_in, device=device).to(dtype)
    y = torch.empty(tokens, shape.d_out, dtype=dtype, device=device)
    truth = traffic.base(shape, tokens, card)
    yield _row("base", timer(partial(torch.mm, x, weight.t(), out=y)), truth)
    del weight
    own = _problem(shape, tokens, STOCK_RANK, tokens, device, dtype)
    own.sigma.copy_(torch.eye(STOCK_RANK))
    measured = timer(partial(own.run_, own.y))
    model = traffic.compressed(shape, tokens, STOCK_RANK, tokens, card, used=tokens)
    yield _row("ours, uncompressed", measured, model)
    del own
    for rank in sizes["ranks"]:
        for clusters in sizes["clusters"]:
            at = {"rank": rank, "clusters": clusters}
            for who, options in _forms(tokens).items():
                ours = _problem(shape, tokens, rank, clusters, device, dtype, **options)
                model = traffic.compressed(
                    shape,
                    tokens,
                    rank,
                    ours.module.clusters,
                    card,
                    base_bits=16 if ours.module.eight_bit is None else 8,
                    dense=options.get("dense"),
                    used=min(tokens, clusters),
                )
                yield at | _row(who, timer(partial(ours.run_, ours.y)), model)
                del ours
            slots = equal_memory_slots(shape, tokens, rank, clusters)
            stock = stock_launches(shape, tokens, slots, device, dtype)
            if stock is not None:
                moved = traffic.stock(shape, min(tokens, slots), STOCK_RANK, card)
                yield at | {"slots": slots} | _row("vllm, equal memory", timer(stock), moved)


def _forms(tokens: int) -> dict[str, dict[str, Any]]:
    """Who runs in a batch of so many tokens, with what of ``make_problem``."""
    forms: dict[str, dict[str, Any]] = {"ours": {}}
    if tokens <= DECODE_ROWS:
        forms |= {"ours, by cluster": {"dense": False}, "ours, all clusters": {"dense": True}}
    return forms | {"ours, int8": {"eight_bit": torch.int8}, "ours, fp8": {"eight_bit": torch.float8_e4m3fn}}


def equal_memory_slots(shape: ModuleShape, tokens: int, rank: int, clusters: int) -> int:
    """Rank-16 LoRA slots in the memory of K pairs of bases of rank R and a scaling for each token; at least one."""
    slices = len(shape.widths)
    each = slices * shape.d_in + shape.d_out
    return max(1, (clusters * rank * each + tokens * slices * rank * rank) // (STOCK_RANK * each))


def stock_launches(
    shape: ModuleShape, tokens: int, slots: int, device: str, dtype: torch.dtype
) -> Callable[[], None] | None:
    """vLLM's shrink and expand of this module, or None where vLLM or its Triton kernels cannot be imported."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError:
        return None
    a = tuple(
        torch.randn(slots, 1, STOCK_RANK, shape.d_in, device=device).to(dtype) / shape.d_in**0.5 for _ in shape.widths
    )
    b = tuple(torch.randn(slots, 1, width, STOCK_RANK, device=device).to(dtype) / 4 for width in shape.widths)
    x = torch.randn(tokens, shape.d_in, device=device).to(dtype)
    y = torch.zeros(tokens, shape.d_out, dtype=dtype, device=device)
    hidden = torch.empty(len(shape.widths), tokens, STOCK_RANK, dtype=torch.float32, device=device)
    meta = LoRAKernelMeta.make(slots, tokens, device=device)
    meta.prepare_tensors(torch.arange(tokens, device=device) % slots)
    arguments = meta.meta_args(tokens, False)

    def run() -> None:
        lora_shrink(x, a, hidden, *arguments, 1.0)
        lora_expand(hidden, b, y, *arguments, offset_start=0, add_inputs=True)

    return run


def readable(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    at = f"K {row['clusters']:3d} R {row['rank']:2d}" if "clusters" in row else " " * 10
    return (
        f"{row['module']:8s} T {row['tokens']:3d} {at} {row['who']:20s} {row['microseconds']:8.1f} µs "
        f"(model {row['predicted']:6.1f}) {row['gb_per_s']:7.0f} GB/s = {row['share_of_copy']:4.0%} of a copy"
    )


def _problem(
    shape: ModuleShape, tokens: int, rank: int, clusters: int, device: str, dtype: torch.dtype, **options: Any
) -> Problem:
    """A step of as many adapters as tokens, in the K clusters."""
    problem = make_problem(
        shape.d_in,
        shape.widths,
        rank=rank,
        clusters=clusters,
        slots=tokens,
        tokens=tokens,
        dtype=dtype,
        device=device,
        **options,
    )
    problem.step(range(tokens), clusters)
    return problem


def _row(who: str, microseconds: float, model: traffic.Traffic) -> dict[str, Any]:
    return {"who": who, "microseconds": microseconds, "bytes": model.memory, "predicted": model.microseconds}


def _modelled(device: str) -> traffic.Card:
    """The model's numbers of this card; of an H100 where it has none, for bytes depend on no card."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((card for known, card in traffic.CARDS.items() if known in name), traffic.CARDS["H100"])


def _power_limit() -> str | None:
    """As nvidia-smi says it ("700.00 W"), where it is installed."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    command = [program, "--query-gpu=power.limit", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return told[0].strip() if told else None


def _version_of_vllm() -> str | None:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
