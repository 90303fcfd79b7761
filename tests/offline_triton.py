"""Triton kernels without a GPU: run a file of checks in the interpreter, or compile the kernels for real GPUs.

    python tests/offline_triton.py check FILE [--native]   pytest on FILE, interpreted unless --native (a GPU)
    python tests/offline_triton.py compile [--base-bits 8 | 16] [--record]
                                                           one JSON line for each launch and GPU; all into the table

Each runs in a process of its own, because Triton decides at decoration whether a kernel is interpreted: an interpreted
one cannot be compiled, and TRITON_INTERPRET set after the import comes too late.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ARCHITECTURES = (80, 89, 90, 100, 120)  # A100, L4/L40S, H100/H200, B200, RTX 50
COMPILED_RANKS = (16, 64, 128)
FUSED_RANKS = (16, 64)
SLICES = 3
RESOURCES = Path(__file__).parent / "kernels" / "triton_resources.json"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler gave for one launch on one GPU architecture."""

    launch: str
    architecture: int
    registers: int
    spilled_bytes: int  # local memory of a thread; these kernels have no arrays, so all of it is spills
    shared_bytes: int
    narrow_loads: int  # from global memory, of fewer bits than 32: what a weight without a known alignment gives
    narrow_copies: int  # asynchronous, of fewer bytes than 16
    asynchronous_tensor_cores: bool  # wgmma, tcgen05


def compile_for(
    launch: str, kernel, signature: dict[str, str], constants: dict[str, int], architecture: int, **options
):
    """Compile as the launcher would: pointers and strides are multiples of 16, ``do_not_specialize`` is honoured."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unspecialised = {kernel.arg_names[i] if isinstance(i, int) else i for i in kernel.do_not_specialize or ()}
    types = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in kernel.arg_names}
    divisible = [name for name, kind in types.items() if kind != "constexpr" and name not in unspecialised]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    resources = _cubin_resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)
    return Compiled(
        launch=launch,
        architecture=architecture,
        registers=resources["REG"],
        spilled_bytes=resources["STACK"] + resources["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        narrow_loads=len(re.findall(r"ld\.global[^;\n]*\.[bus](?:8|16)\b", ptx)),
        narrow_copies=sum(int(size, 16) < 16 for size in copies),
        asynchronous_tensor_cores="wgmma" in ptx or "tcgen05" in ptx,
    )


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage.stdout)}


Launch = tuple[str, Any, dict[str, str], dict[str, int], dict[str, int]]
"""Name, kernel, pointer types, constants and options of a launch."""


def launches() -> Iterator[Launch]:
    """The launches that serving makes for bf16 models with bases of 16 bits."""
    from vllm_jdlora.kernels import token_tiles, triton_sigma

    for rank in COMPILED_RANKS:
        for tokens in (token_tiles.PREFILL_TOKENS, token_tiles.PREFILL_TOKENS + 1):
            yield _shrink(rank, tokens)
            yield _expand(rank, tokens)
        yield _sigma(rank, triton_sigma.FULL)
    yield _sigma(16, triton_sigma.DIAGONAL)
    for scaling in (triton_sigma.FULL, triton_sigma.DIAGONAL):
        for rank in FUSED_RANKS:
            yield _expand(rank, 1, scaling)
    yield _shrink(64, 1, dense=True)


def eight_bit_launches() -> Iterator[Launch]:
    """Those with clusters of 8 bits beside plain adapters of 16."""
    from vllm_jdlora.kernels import token_tiles, triton_sigma, triton_widen

    for stored in (triton_widen.INT8, triton_widen.FP8):
        for tokens in (token_tiles.PREFILL_TOKENS, token_tiles.PREFILL_TOKENS + 1):
            yield _shrink(64, tokens, stored)
            yield _expand(64, tokens, stored=stored)
    int8 = triton_widen.INT8
    yield _shrink(64, 1, int8, dense=True)
    yield _expand(128, token_tiles.PREFILL_TOKENS + 1, stored=int8)
    for rank in FUSED_RANKS:
        yield _expand(rank, 1, triton_sigma.FULL, int8)
        yield _expand(rank, 1, triton_sigma.DIAGONAL, int8)
    yield _sigma(16, triton_sigma.FULL, int8)


_TABLES = dict.fromkeys(("tile_ptr", "token_ptr", "slot_ptr", "cluster_ptr", "column_ptr"), "*i32")
_TABLES |= dict.fromkeys(("v_pointers_ptr", "u_pointers_ptr"), "*i64")
_TABLES |= dict.fromkeys(("v_scale_ptr", "u_scale_ptr"), "*fp32")
_SCALINGS = ("", "Σ full and ", "Σ diagonal and ")
_KINDS = ("", "int8 ", "fp8 ")


def _shrink(rank: int, tokens: int, stored: int = 0, dense: bool = False) -> Launch:
    from vllm_jdlora.kernels import triton_shrink

    sizes = triton_shrink.Launch.of(tokens, 16, SLICES * rank, 4096, 132, False, dense=dense)
    types = _TABLES | {"x_ptr": "*bf16", "h_ptr": "*fp32"}
    constants = triton_shrink.constants_of(rank, SLICES, sizes, stored)
    name = f"{_KINDS[stored]}shrink{' of all clusters' if dense else ''}, R {rank}, {sizes.rows} rows"
    return name, triton_shrink.shrink_kernel, types, constants, {"num_warps": 4, "num_stages": 3}


def _expand(rank: int, tokens: int, scaling: int = 0, stored: int = 0) -> Launch:
    from vllm_jdlora.kernels import triton_expand, triton_shrink

    rows = triton_shrink.Launch.of(tokens, 16, SLICES * rank, 4096, 132, False).rows
    types = _TABLES | {"g_ptr": "*fp32" if scaling or stored else "*bf16", "sigma_ptr": "*bf16", "y_ptr": "*bf16"}
    constants = triton_expand.constants_of(rank, SLICES, rows, 16, scaling, True, stored)
    options = {"num_warps": triton_expand.warps_of(rank, rows, scaling), "num_stages": 1}
    name = f"{_KINDS[stored]}{_SCALINGS[scaling]}expand, R {rank}" + ("" if scaling else f", {rows} rows")
    return name, triton_expand.expand_kernel, types, constants, options


def _sigma(rank: int, scaling: int, stored: int = 0) -> Launch:
    from vllm_jdlora.kernels import triton_sigma

    types = _TABLES | {"h_ptr": "*fp32", "g_ptr": "*fp32" if stored else "*bf16", "sigma_ptr": "*bf16"}
    options = {"num_warps": triton_sigma.warps_of(rank), "num_stages": 1}
    name = f"{_KINDS[stored]}Σ{' diagonal' if scaling == triton_sigma.DIAGONAL else ''}, R {rank}"
    return name, triton_sigma.sigma_kernel, types, triton_sigma.constants_of(rank, SLICES, scaling), options


def compile_all(base_bits: int | None = None) -> Iterator[Compiled]:
    """Every launch, or those with bases of so many bits, on every architecture."""
    chosen = {16: (launches,), 8: (eight_bit_launches,), None: (launches, eight_bit_launches)}[base_bits]
    for name, kernel, types, constants, options in itertools.chain(*(of_bits() for of_bits in chosen)):
        for architecture in ARCHITECTURES:
            yield compile_for(name, kernel, types, constants, architecture, **options)


def record(rows: list[Compiled]) -> None:
    """Write the table of registers and shared bytes that the test compares with."""
    import triton

    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        table.setdefault(row.launch, {})[f"sm_{row.architecture}"] = [row.registers, row.shared_bytes]
    lines = [f" {json.dumps(name, ensure_ascii=False)}: {json.dumps(sizes)}" for name, sizes in table.items()]
    RESOURCES.write_text(f'{{"triton": "{triton.__version__}", "launches": {{\n' + ",\n".join(lines) + "\n}}\n")


def multiply_bf16_as_numbers() -> None:
    """Repair ``tl.dot`` on bf16 in the interpreter of Triton 3.9, which multiplies bit patterns, silently."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    stock = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return stock(self, widened(a), widened(b), d, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


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
    compile_command = commands.add_parser("compile")
    compile_command.add_argument("--base-bits", type=int, choices=(8, 16))
    compile_command.add_argument("--record", action="store_true")
    args = parser.parse_args()
    if args.command == "compile" and args.record and args.base_bits:
        parser.error("--record writes the whole table: leave --base-bits out")
    if args.command == "check":
        import pytest

        os.environ.pop("TRITON_INTERPRET", None)
        if not args.native:
            os.environ["TRITON_INTERPRET"] = "1"
            multiply_bf16_as_numbers()
        return int(pytest.main([args.file, "-q", "-p", "no:cacheprovider", "-p", "no:logging"]))
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        rows = []
        for compiled in compile_all(args.base_bits):
            rows.append(compiled)
            print(json.dumps(dataclasses.asdict(compiled), ensure_ascii=False), flush=True)
        if args.record:
            record(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
