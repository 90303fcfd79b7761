"""Are the GPU kernels right and fast on this machine? ``make gpu-check``; needs torch, triton and a GPU, no vLLM.

In this order: results against the fp32 loops, replay of a CUDA graph with other batches than at its capture, no memory
taken in a step, compute-sanitizer where it is installed, and a benchmark. Exit code 1 says that a check failed or that
there is no GPU; the reason is one line on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # From a checkout without installation: the package's own folder does not hold its kernels.
    _root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_root)
    import vllm_jdlora

    vllm_jdlora.__path__.append(str(_root))

if TYPE_CHECKING:
    import torch

    from vllm_jdlora.kernels.gpu_problem import Problem

# Relative error of y in the Frobenius norm: two roundings to nearest, of Σ V x and of y, with room for half again.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}
SANITIZER_TOOLS = ("memcheck", "racecheck")


class CheckFailed(Exception):
    """A check found a difference; the text says which."""


def mixes(tokens: int, slots: int) -> dict[str, list[int]]:
    """Scaling slot of each token in steps that differ in everything; shorter ones leave padding behind them."""
    return {
        "distinct": [t % slots for t in range(tokens)],
        "one adapter": [slots // 2] * max(1, tokens // 2),
        "skewed, with the base model": [(t * t) % slots if t % 3 else -1 for t in range(tokens)],
        "base model": [-1] * tokens,
    }


def require_equal(problem: Problem, y: torch.Tensor, what: str) -> None:
    """Raise :class:`CheckFailed` unless y is what the loops give for the problem's step."""
    import torch

    from vllm_jdlora.kernels import reference

    x, before, sigma = problem.x.cpu(), problem.y.cpu(), problem.sigma.cpu()
    truth = reference.jd_linear(before, x, problem.u, problem.v, sigma, problem.cluster, problem.slot)
    base = problem.base_rows
    if not torch.equal(y.cpu()[base], before[base]):
        raise CheckFailed(f"{what}: rows of the base model were changed")
    error = (y.cpu().float() - truth).norm() / truth.norm()
    if not error <= TOLERANCE[str(y.dtype).removeprefix("torch.")]:
        raise CheckFailed(f"{what}: relative error {error:.1e}")


def variants() -> dict[str, dict[str, Any]]:
    """What else of ``make_problem`` differs between the problems."""
    import torch

    return {
        "as served": {},
        "same bits in any batch": {"batch_invariant": True},
        "diagonal": {"diagonal": True},
        "by cluster": {"dense": False},
        "int8": {"eight_bit": torch.int8},
        "fp8": {"eight_bit": torch.float8_e4m3fn},
    }


def check_results(
    device: str,
    sizes: Sequence[tuple[int, tuple[int, ...]]],
    tokens: Sequence[int],
    ranks: Sequence[int] = (8, 16, 32, 64, 128),
) -> int:
    """Every rank, dtype, batch size, variant and mix against the loops; the number of steps compared."""
    import torch

    from vllm_jdlora.kernels.gpu_problem import make_problem

    compared = 0
    for rank, dtype, count in itertools.product(ranks, (torch.bfloat16, torch.float16), tokens):
        d_in, widths = sizes[compared // len(variants()) % len(sizes)]
        for variant, options in variants().items():
            problem = make_problem(
                d_in,
                widths,
                rank=rank,
                clusters=5,
                slots=12,
                tokens=count,
                dtype=dtype,
                device=device,
                **options,
            )
            for name, slots in mixes(count, 12).items():
                problem.step(slots)
                y = problem.run_(problem.y.clone())
                again = problem.run_(problem.y.clone())
                what = f"{widths} R {rank} {dtype} T {count} {variant}, {name}"
                require_equal(problem, y, what)
                if not torch.equal(y, again):
                    raise CheckFailed(f"{what}: a second run gave other bits")
                compared += 1
    return compared


def check_replay() -> int:
    """A graph captured with two adapters follows steps with more adapters, other clusters, and none; how many."""
    import torch

    from vllm_jdlora.kernels.gpu_problem import make_problem

    replayed = 0
    # At 12 tokens the shrink takes the V of all clusters.
    for rank, tokens, eight_bit in ((16, 48, None), (64, 48, None), (64, 48, torch.int8), (16, 12, None)):
        problem = make_problem(
            4096,
            (4096, 1024, 1024),
            rank=rank,
            clusters=5,
            slots=40,
            tokens=tokens,
            dtype=torch.bfloat16,
            device="cuda",
            eight_bit=eight_bit,
        )
        problem.step([0, 1] * (tokens // 2))
        y = problem.run_(problem.y.clone())  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.run_(y)
        for name, slots in mixes(tokens, 40).items():
            what = f"replay, R {rank}, T {tokens}, {eight_bit or '16 bits'}, {name}"
            problem.step(slots)
            y.copy_(problem.y)
            graph.replay()
            require_equal(problem, y, what)
            if not torch.equal(y, problem.run_(problem.y.clone())):
                raise CheckFailed(f"{what}: other bits than without a graph")
            replayed += 1
        taken = torch.cuda.memory_stats()["allocation.all.allocated"]
        problem.run_(y)
        if torch.cuda.memory_stats()["allocation.all.allocated"] != taken:
            raise CheckFailed(f"R {rank}: a step took device memory")
    return replayed


def check_sanitizer() -> list[str]:
    """Run the checks of results under compute-sanitizer; the tools that found nothing, none if it is not installed."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return []
    for tool in SANITIZER_TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "3", sys.executable, __file__, "--small"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CheckFailed(f"compute-sanitizer {tool}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    return list(SANITIZER_TOOLS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="only results and replay on small sizes")
    parser.add_argument("--quick", action="store_true", help="a benchmark of 18 conditions for each module, not of 200")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the benchmark's JSON lines to FILE")
    args = parser.parse_args(arguments)
    try:
        import torch
        import triton
    except ImportError as error:
        print(f"gpu-check: {error}; it needs torch and triton", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("gpu-check: no NVIDIA GPU that this torch can use; nothing was checked", file=sys.stderr)
        return 1
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}")
    small = [(264, (96, 32, 32)), (512, (160,)), (130, (48, 80))]
    try:
        steps = check_results("cuda", small, (1, 7, 33, 200, 600) if not args.small else (1, 33, 520))
        print(f"results: {steps} steps equal the fp32 loops, base rows to the bit")
        print(f"replay: {check_replay()} steps through graphs captured for others, to the bit; no memory taken")
        if args.small:
            return 0
        tools = check_sanitizer()
        print(f"compute-sanitizer: {', '.join(tools) + ' found nothing' if tools else 'is not installed'}")
    except CheckFailed as failure:
        print(f"gpu-check: {failure}", file=sys.stderr)
        return 1
    from vllm_jdlora.kernels import gpu_bench

    for row in gpu_bench.benchmark(quick=args.quick):
        print(gpu_bench.readable(row), flush=True)
        if args.out is not None:
            with args.out.open("a") as out:
                print(json.dumps(row), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
