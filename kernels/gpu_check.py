"""Are the GPU kernels right and fast on this machine? ``make gpu-check``; needs torch, triton and a GPU, no vLLM.

In this order: results against the fp32 loops, replay of a CUDA graph with other batches than at its capture, no memory
taken in a step, compute-sanitizer where it is installed, and a benchmark. Exit code 1 says that a check failed or that
there is no GPU; the reason is one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # From a checkout without installation: the package's own folder does not hold its kernels.
    _root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(_root)
    import vllm_jdlora

    vllm_jdlora.__path__.append(str(_root))

if TYPE_CHECKING:
    import torch

    from vllm_jdlora.kernels.packed_module import PackedModule
    from vllm_jdlora.kernels.triton_grouped import GroupedLoRA

# Relative error of y in the Frobenius norm: two roundings to nearest, of Σ V x and of y, with room for half again.
TOLERANCE = {"bfloat16": 3e-3, "float16": 4e-4}
SANITIZER_TOOLS = ("memcheck", "racecheck")


class CheckFailed(Exception):
    """A check found a difference; the text says which."""


@dataclass
class Problem:
    """One packed module and room for steps on it.

    Attributes:
        u: for each slice [clusters, d_out, R].
        v: for each slice [clusters, R, d_in].
        sigma: [slots, slices, R, R].
        x: [T, d_in].
        y: [T, sum of d_out], what adapters are added to.
    """

    kernels: GroupedLoRA
    module: PackedModule
    u: list[torch.Tensor]
    v: list[torch.Tensor]
    sigma: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def step(self, slots: Sequence[int]) -> None:
        """Plan tokens with these slots; adapter s lies in cluster s mod K, −1 is the base model."""
        import numpy as np

        slot = np.asarray(slots, dtype=np.int64)
        self.kernels.tiles.plan(np.where(slot < 0, -1, slot % self.module.clusters), slot)

    def run_(self, y: torch.Tensor) -> torch.Tensor:
        self.kernels.linear_(y, self.x, self.module, self.sigma)
        return y


def make_problem(
    d_in: int,
    widths: Sequence[int],
    *,
    rank: int,
    clusters: int,
    slots: int,
    tokens: int,
    dtype: torch.dtype,
    device: str,
    batch_invariant: bool = False,
) -> Problem:
    """Seeded random numbers of the size of activations, spread by no factor much."""
    import torch

    from vllm_jdlora.kernels.packed_module import PackedModule
    from vllm_jdlora.kernels.token_tiles import TokenTiles
    from vllm_jdlora.kernels.triton_grouped import GroupedLoRA

    g = torch.Generator(device).manual_seed(rank * 1000 + tokens)

    def rand(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    v = [rand(clusters, 1, rank, d_in, scale=d_in**-0.5) for _ in widths]
    u = [rand(clusters, 1, width, rank, scale=rank**-0.5) for width in widths]
    sigma = rand(slots, len(widths), rank, rank, scale=rank**-0.5)
    kernels = GroupedLoRA(TokenTiles(tokens, clusters, device), device, batch_invariant)
    module = PackedModule.of(v, u)
    kernels.reserve(module)
    x, y = rand(tokens, d_in), rand(tokens, sum(widths))
    return Problem(kernels, module, [s[:, 0] for s in u], [s[:, 0] for s in v], sigma, x, y)


def mixes(tokens: int, slots: int) -> dict[str, list[int]]:
    """Scaling slot of each token in steps that differ in everything; shorter ones leave padding behind them."""
    return {
        "distinct": [t % slots for t in range(tokens)],
        "one adapter": [slots // 2] * max(1, tokens // 2),
        "skewed, with the base model": [(t * t) % slots if t % 3 else -1 for t in range(tokens)],
        "base model": [-1] * tokens,
    }


def require_equal(problem: Problem, y: torch.Tensor, slots: Sequence[int], what: str) -> None:
    """Raise :class:`CheckFailed` unless y is what the loops give for a step with these slots."""
    import torch

    from vllm_jdlora.kernels import reference

    padded = [*slots, *[-1] * (len(problem.x) - len(slots))]
    cluster = [s % problem.module.clusters if s >= 0 else -1 for s in padded]
    x, before, sigma = problem.x.cpu(), problem.y.cpu(), problem.sigma.cpu()
    u, v = [s.cpu() for s in problem.u], [s.cpu() for s in problem.v]
    truth = reference.jd_linear(before, x, u, v, sigma, cluster, padded)
    base = torch.tensor(padded) < 0
    if not torch.equal(y.cpu()[base], before[base]):
        raise CheckFailed(f"{what}: rows of the base model were changed")
    error = (y.cpu().float() - truth).norm() / truth.norm()
    if not error <= TOLERANCE[str(y.dtype).removeprefix("torch.")]:
        raise CheckFailed(f"{what}: relative error {error:.1e}")


def check_results(device: str, sizes: Sequence[tuple[int, tuple[int, ...]]], tokens: Sequence[int]) -> int:
    """Every rank, dtype, batch size and mix against the loops; the number of steps compared."""
    import torch

    compared = 0
    for rank in (8, 16, 32, 64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            for count in tokens:
                d_in, widths = sizes[compared % len(sizes)]
                for invariant in (False, True):
                    problem = make_problem(
                        d_in,
                        widths,
                        rank=rank,
                        clusters=5,
                        slots=12,
                        tokens=count,
                        dtype=dtype,
                        device=device,
                        batch_invariant=invariant,
                    )
                    for name, slots in mixes(count, 12).items():
                        problem.step(slots)
                        y = problem.run_(problem.y.clone())
                        again = problem.run_(problem.y.clone())
                        what = f"{widths} R {rank} {dtype} T {count} {name}"
                        require_equal(problem, y, slots, what)
                        if not torch.equal(y, again):
                            raise CheckFailed(f"{what}: a second run gave other bits")
                        compared += 1
    return compared


def check_replay(tokens: int = 48) -> int:
    """A graph captured with two adapters follows steps with more adapters, other clusters, and none; how many."""
    import torch

    replayed = 0
    for rank in (16, 64):
        problem = make_problem(
            4096,
            (4096, 1024, 1024),
            rank=rank,
            clusters=7,
            slots=40,
            tokens=tokens,
            dtype=torch.bfloat16,
            device="cuda",
        )
        problem.step([0, 1] * (tokens // 2))
        y = problem.run_(problem.y.clone())  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.run_(y)
        for name, slots in mixes(tokens, 40).items():
            problem.step(slots)
            y.copy_(problem.y)
            graph.replay()
            require_equal(problem, y, slots, f"replay, R {rank}, {name}")
            if not torch.equal(y, problem.run_(problem.y.clone())):
                raise CheckFailed(f"replay, R {rank}, {name}: other bits than without a graph")
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
