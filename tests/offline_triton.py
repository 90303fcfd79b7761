"""Triton kernels without a GPU: run a file of checks in the interpreter, or compile the Σ kernels for real GPUs.

    python tests/offline_triton.py check FILE [--native]   pytest on FILE, interpreted unless --native (a GPU)
    python tests/offline_triton.py compile                 one JSON line for each kernel, rank and GPU

Each runs in a process of its own, because Triton decides at decoration whether a kernel is interpreted: an interpreted
one cannot be compiled, and TRITON_INTERPRET set after the import comes too late.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ARCHITECTURES = (80, 89, 90, 100, 120)  # A100, L4/L40S, H100/H200, B200, RTX 50
COMPILED_RANKS = (16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler gave for one kernel on one GPU architecture."""

    kernel: str
    rank: int
    architecture: int
    registers: int
    spilled_bytes: int  # local memory of a thread; these kernels have no arrays, so all of it is spills
    shared_bytes: int
    widest_load_bits: int
    barrier_precedes_stores: bool


def compile_for(kernel, signature: dict[str, str], constants: dict[str, int], architecture: int, **options) -> Compiled:
    """Compile as the launcher would: pointers and strides are multiples of 16, ``do_not_specialize`` is honoured."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unspecialised = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    divisible = [name for name in signature if name not in unspecialised]
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources = _cubin_resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        kernel=kernel.__name__,
        rank=constants["R"],
        architecture=architecture,
        registers=resources["REG"],
        spilled_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        widest_load_bits=max(
            int(count or 1) * int(bits) for count, bits in re.findall(r"ld\.global(?:\.v([24]))?\.b(\d+)", ptx)
        ),
        barrier_precedes_stores=_barrier_precedes_stores(ptx),
    )


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.stdout)}


def _barrier_precedes_stores(ptx: str) -> bool:
    """Whether a barrier stands between the loads of a row of h and the first store to it.

    Reads the text in order: true only while the compiler lays out the early return for −1 tokens, which stores zeros
    without loading h, behind the main path.
    """
    load, barrier, store = (ptx.find(text) for text in ("ld.global", "bar.sync", "st.global"))
    return 0 <= load < barrier < store


def compile_all() -> Iterator[Compiled]:
    """Every Σ kernel that serving launches for bf16 scalings, on every architecture."""
    from vllm_jdlora.kernels import triton_sigma as module

    scalars = {"tokens": "i32", "sigma_slot_stride": "i32", "sigma_slice_stride": "i32"}
    signature = {"h_ptr": "*fp32", "sigma_ptr": "*bf16", "token_slot_ptr": "*i32", **scalars}
    for rank in COMPILED_RANKS:
        launch = module.Launch.for_rank(rank)
        full = {"R": rank, "BLOCK_R": launch.block_r, "ROWS": launch.rows}
        diag = {"R": rank, "BLOCK_R": launch.block_r, "TOKENS": module._DIAG_TOKENS}
        for architecture in ARCHITECTURES:
            for kernel, constants in ((module.sigma_full_kernel, full), (module.sigma_diag_kernel, diag)):
                yield compile_for(kernel, signature, constants, architecture, num_warps=launch.num_warps, num_stages=1)


def import_vllm_lora_kernels() -> None:
    """Import vLLM's LoRA kernels with the real Triton, although vLLM found no GPU driver and disabled it.

    Only for the interpreter, never in a server. The rest of vLLM keeps believing that there is no Triton.
    """
    import triton
    import triton.language as tl
    import vllm.lora.layers  # first and unpatched, so that only what follows sees Triton
    import vllm.triton_utils

    module = "vllm.lora.punica_wrapper.punica_gpu"
    if module in sys.modules:
        raise RuntimeError(f"{module} is already imported without Triton")
    with mock.patch.multiple(vllm.triton_utils, triton=triton, tl=tl, HAS_TRITON=True):
        importlib.import_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check")
    check.add_argument("file")
    check.add_argument("--native", action="store_true")
    commands.add_parser("compile")
    args = parser.parse_args()
    if args.command == "check":
        import pytest

        os.environ.pop("TRITON_INTERPRET", None)
        if not args.native:
            os.environ["TRITON_INTERPRET"] = "1"
        return int(pytest.main([args.file, "-q", "-p", "no:cacheprovider", "-p", "no:logging"]))
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for compiled in compile_all():
            print(json.dumps(dataclasses.asdict(compiled)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
