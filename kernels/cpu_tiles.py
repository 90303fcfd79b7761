"""The inner loops of the CPU kernel: tiles of tokens × rows kept in vector registers, as LLVM code for this machine.

numba compiles them when a server starts, so that no compiler is needed. They are written as vector code, and not as
loops for a compiler to vectorise, since the products of bf16 pairs that newer processors have (AVX-512 BF16: twice
the rate of fp32) cannot be said in a loop. Memory is given by addresses; the caller answers for what lies there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import llvmlite.binding
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_I64, _I32, _I16, _FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_FAST = ("fast",)
TOKENS = (1, 2, 4)
"""Tokens of a tile."""
BLOCK = 4
"""Rows of V that lie side by side, step by step of d_in."""


class _BFloat(ir.Type):
    """bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@dataclass(frozen=True)
class Form:
    """How bases lie in memory, and what multiplies them.

    Attributes:
        stored: dtype of U and V, x and y.
        pairs: products of bf16 pairs, summed in fp32 (x and Σ h in bf16); else in fp32.
        lanes: fp32 numbers of a vector.
    """

    stored: torch.dtype
    pairs: bool
    lanes: int

    @classmethod
    def here(cls, dtype: torch.dtype) -> Form:
        """For a model in bf16 or fp32 on this machine. Raises ValueError for other dtypes."""
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"the CPU kernel stores bases in bf16 or fp32, not in {dtype}")
        features = llvmlite.binding.get_host_cpu_features()
        wide = features.get("avx512f", False) and features.get("avx512bw", False)
        return cls(dtype, dtype == torch.bfloat16 and wide and features.get("avx512bf16", False), 16 if wide else 8)

    @property
    def step(self) -> int:
        """Numbers of d_in that a turn of shrink takes: x and V are padded to a multiple."""
        return self.lanes * (2 if self.pairs else 1)

    @property
    def vector_bytes(self) -> int:
        """Bytes of a basis that a product reads at once."""
        return self.step * (2 if self.stored == torch.bfloat16 else 4)

    def rows(self, tokens: int) -> int:
        """Rows of V beside so many tokens: as many sums as a vector has lanes."""
        return self.lanes // tokens

    @property
    def vectors(self) -> int:
        """Vectors of outputs of a wide tile of expand: with four tokens, sums for half of the registers."""
        return self.lanes // 4


def lay_v(form: Form, v: torch.Tensor, out: torch.Tensor) -> None:
    """V [rows, d_in] as shrink reads it, in one stream: out [rows / 4, turns, 4, step], zeros where V has nothing."""
    blocks, turns, _, step = out.shape
    full = torch.zeros(blocks * BLOCK, turns * step, dtype=form.stored)
    full[: v.shape[0], : v.shape[1]] = v
    out.copy_(full.view(blocks, BLOCK, turns, step).transpose(1, 2))


def lay_u(form: Form, u: torch.Tensor, out: torch.Tensor) -> None:
    """U [d_out, R] as expand reads it: out [d_out / lanes, R / each, lanes, each], with pairs of r (2) or each (1)."""
    blocks, turns, lanes, each = out.shape
    full = torch.zeros(blocks * lanes, turns * each, dtype=form.stored)
    full[: u.shape[0]] = u
    out.copy_(full.view(blocks, lanes, turns, each).transpose(1, 2))


def shrink_tile(form: Form, tokens: int) -> Any:
    """numba intrinsic ``(x_rows, v, v_block, turns, h, h_stride, ahead)``: ``h[t, j] = V[j] · x[t]`` in fp32.

    All int64. x_rows: address of the addresses of ``tokens`` rows, padded to ``turns`` steps (bf16 for pairs, else
    fp32); v: address of `form.rows(tokens)` rows in the layout of `lay_v`; v_block: bytes from block to block.
    ahead: bytes from here to what is read next, of which as much is fetched meanwhile.
    """
    rows, lanes = form.rows(tokens), form.lanes

    def body(code: _Code, x_rows: Any, v: Any, v_block: Any, turns: Any, h: Any, h_stride: Any, ahead: Any) -> None:
        x_at = [code.load_i64(x_rows, 8 * t) for t in range(tokens)]
        blocks = [code.add(v, code.times(v_block, block)) for block in range(-(-rows // BLOCK))]
        with code.loop(turns, [code.zeros(lanes)] * (tokens * rows)) as (turn, sums):
            xs = [code.load(code.add(a, code.times(turn, lanes * 4)), lanes, form, "x") for a in x_at]
            here = [code.add(a, code.times(turn, BLOCK * form.vector_bytes)) for a in blocks]
            vs = [
                code.load(code.plus(here[j // BLOCK], j % BLOCK * form.vector_bytes), lanes, form, "basis")
                for j in range(rows)
            ]
            for a in here:
                for line in range(0, min(rows, BLOCK) * form.vector_bytes, 64):
                    code.prefetch(code.plus(code.add(a, ahead), line))
            sums[:] = [code.product(form, sums[t * rows + j], xs[t], vs[j]) for t in range(tokens) for j in range(rows)]
        total = code.sums_of(sums)
        for t in range(tokens):
            part = code.part(total, t * rows, rows)
            code.store(part, code.add(h, code.times(h_stride, t)))

    @intrinsic
    def tile(context, x_rows, v, v_block, turns, h, h_stride, ahead):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), _generating(body)

    return tile


def expand_tile(form: Form, tokens: int, vectors: int) -> Any:
    """numba intrinsic ``(y_rows, offset, u, u_block, g, g_stride, turns, ahead)``: ``y[t] += U g[t]``.

    All int64. y_rows: address of the addresses of ``tokens`` rows; offset: bytes to the first output in a row; u:
    address of ``vectors`` blocks in the layout of `lay_u`, ``u_block`` bytes apart, of ``turns`` vectors each; g: fp32
    [tokens, R], or pairs of bf16, its rows ``g_stride`` bytes apart; ahead: as for shrink. y is rounded once.
    """
    lanes = form.lanes
    width = 2 if form.stored == torch.bfloat16 else 4

    def body(
        code: _Code, y_rows: Any, offset: Any, u: Any, u_block: Any, g: Any, g_stride: Any, turns: Any, ahead: Any
    ) -> None:
        y_at = [code.add(code.load_i64(y_rows, 8 * t), offset) for t in range(tokens)]
        g_at = [code.add(g, code.times(g_stride, t)) for t in range(tokens)]
        blocks = [code.add(u, code.times(u_block, k)) for k in range(vectors)]
        before = [code.load_output(code.plus(a, k * lanes * width), form) for a in y_at for k in range(vectors)]
        with code.loop(turns, before) as (turn, sums):
            us = [code.load(code.add(a, code.times(turn, form.vector_bytes)), lanes, form, "basis") for a in blocks]
            gs = [code.broadcast(code.add(a, code.times(turn, 4)), form) for a in g_at]
            for a in blocks:
                code.prefetch(code.add(code.add(a, ahead), code.times(turn, form.vector_bytes)))
            sums[:] = [
                code.product(form, sums[t * vectors + k], gs[t], us[k]) for t in range(tokens) for k in range(vectors)
            ]
        for t, address in enumerate(y_at):
            for k in range(vectors):
                code.store_output(sums[t * vectors + k], code.plus(address, k * lanes * width), form)

    @intrinsic
    def tile(context, y_rows, offset, u, u_block, g, g_stride, turns, ahead):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 8), _generating(body)

    return tile


def sigma_tile(form: Form, lanes: int, diagonal: bool) -> Any:
    """numba intrinsic ``(sigma, turns, h, g)``: ``g[r] = Σ[r] · h`` for so many rows r as there are lanes.

    All int64 addresses of fp32 but g, which is bf16 for pairs; Σ has rows of ``turns`` · lanes numbers. A diagonal Σ is
    a vector of lanes, as is h.
    """
    kept = replace(form, lanes=lanes, pairs=False, stored=torch.float32)

    def body(code: _Code, sigma: Any, turns: Any, h: Any, g: Any) -> None:
        if diagonal:
            total = code.times_each(code.load(sigma, lanes, kept, "x"), code.load(h, lanes, kept, "x"))
        else:
            rows = [code.add(sigma, code.times(turns, 4 * lanes * j)) for j in range(lanes)]
            with code.loop(turns, [code.zeros(lanes)] * lanes) as (turn, sums):
                ahead = code.times(turn, 4 * lanes)
                part = code.load(code.add(h, ahead), lanes, kept, "x")
                sums[:] = [
                    code.product(kept, total, code.load(code.add(row, ahead), lanes, kept, "x"), part)
                    for total, row in zip(sums, rows, strict=True)
                ]
            total = code.sums_of(sums)
        code.store_output(total, g, replace(kept, stored=torch.bfloat16 if form.pairs else torch.float32))

    @intrinsic
    def tile(context, sigma, turns, h, g):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 4), _generating(body)

    return tile


def fetching() -> Any:
    """numba intrinsic ``(address, lines)``: asks for so many lines of memory, at least 1, to be read soon."""

    def body(code: _Code, address: Any, lines: Any) -> None:
        with code.loop(lines, []) as (line, _):
            code.prefetch(code.add(address, code.times(line, 64)))

    @intrinsic
    def fetch(context, address, lines):  # type: ignore[no-untyped-def]
        return types.void(types.int64, types.int64), _generating(body)

    return fetch


def _generating(body: Callable[..., None]) -> Callable[..., Any]:
    def generate(target: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        body(_Code(builder), *values)
        return target.get_dummy_value()

    return generate


class _Code:
    """Writes LLVM instructions at the builder's place."""

    def __init__(self, builder: ir.IRBuilder):
        self._b = builder

    # --- addresses ------------------------------------------------------------------------------------------------

    def add(self, a: Any, b: Any) -> Any:
        return self._b.add(a, b)

    def plus(self, a: Any, number: int) -> Any:
        return self._b.add(a, ir.Constant(_I64, number))

    def times(self, a: Any, number: int) -> Any:
        return self._b.mul(a, ir.Constant(_I64, number))

    def load_i64(self, address: Any, offset: int) -> Any:
        return self._load(self.plus(address, offset), _I64, 8)

    def _load(self, address: Any, kind: ir.Type, align: int) -> Any:
        pointer = self._b.inttoptr(address, kind.as_pointer())
        return self._b.load(pointer, align=align, typ=kind)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        self._b.store(value, self._b.inttoptr(address, value.type.as_pointer()), align=align)

    def prefetch(self, address: Any) -> None:
        """Ask for a line of data, to be read soon, in the cache behind the first."""
        pointer = self._b.inttoptr(address, ir.IntType(8).as_pointer())
        read, near, data = (ir.Constant(_I32, number) for number in (0, 1, 1))
        self._call("llvm.prefetch.p0", ir.VoidType(), [pointer, read, near, data])

    # --- vectors --------------------------------------------------------------------------------------------------

    def zeros(self, lanes: int) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)

    def load(self, address: Any, lanes: int, form: Form, what: str) -> Any:
        """A vector of x or of a basis, as `product` takes it."""
        if form.pairs:
            raw = self._load(address, ir.VectorType(_I32, lanes), 1)
            return self._b.bitcast(raw, ir.VectorType(_BFloat(), 2 * lanes))
        if what == "basis" and form.stored == torch.bfloat16:
            return self._widened(self._load(address, ir.VectorType(_I16, lanes), 1), lanes)
        return self._load(address, ir.VectorType(_FLOAT, lanes), 1)

    def broadcast(self, address: Any, form: Form) -> Any:
        """One fp32 number, or one pair of bf16, in every lane."""
        lanes = form.lanes
        kind = _I32 if form.pairs else _FLOAT
        one = self._load(address, kind, 4)
        vector = ir.VectorType(kind, lanes)
        first = self._b.insert_element(ir.Constant(vector, ir.Undefined), one, ir.Constant(_I32, 0))
        spread = self._b.shuffle_vector(first, ir.Constant(vector, ir.Undefined), self._mask([0] * lanes))
        return self._b.bitcast(spread, ir.VectorType(_BFloat(), 2 * lanes)) if form.pairs else spread

    def product(self, form: Form, total: Any, a: Any, b: Any) -> Any:
        """total + a · b in each lane (of pairs: both products)."""
        if form.pairs:
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * form.lanes}"
            return self._call(name, total.type, [total, a, b])
        return self._call(f"llvm.fma.v{form.lanes}f32", total.type, [a, b, total])

    def times_each(self, a: Any, b: Any) -> Any:
        return self._b.fmul(a, b)

    def sums_of(self, vectors: list[Any]) -> Any:
        """The sum over the lanes of each of L vectors of L lanes, as one vector."""
        lanes = len(vectors)
        even = self._mask(list(range(0, 2 * lanes, 2)))
        odd = self._mask(list(range(1, 2 * lanes, 2)))
        while len(vectors) > 1:
            vectors = [
                self._b.fadd(self._b.shuffle_vector(a, b, even), self._b.shuffle_vector(a, b, odd), flags=_FAST)
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        return vectors[0]

    def part(self, vector: Any, first: int, count: int) -> Any:
        return self._b.shuffle_vector(vector, vector, self._mask(list(range(first, first + count))))

    def load_output(self, address: Any, form: Form) -> Any:
        if form.stored == torch.float32:
            return self._load(address, ir.VectorType(_FLOAT, form.lanes), 1)
        return self._widened(self._load(address, ir.VectorType(_I16, form.lanes), 1), form.lanes)

    def store_output(self, value: Any, address: Any, form: Form) -> None:
        if form.stored == torch.float32:
            self.store(value, address)
        else:
            rounded = self._b.fptrunc(value, ir.VectorType(_BFloat(), form.lanes))
            self.store(self._b.bitcast(rounded, ir.VectorType(_I16, form.lanes)), address)

    def _widened(self, halves: Any, lanes: int) -> Any:
        wide = self._b.zext(halves, ir.VectorType(_I32, lanes))
        shifted = self._b.shl(wide, ir.Constant(ir.VectorType(_I32, lanes), [16] * lanes))
        return self._b.bitcast(shifted, ir.VectorType(_FLOAT, lanes))

    def _mask(self, lanes: list[int]) -> Any:
        return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)

    def _call(self, name: str, result: ir.Type, arguments: list[Any]) -> Any:
        function = self._b.module.globals.get(name)
        if function is None:
            function = ir.Function(self._b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self._b.call(function, arguments)

    # --- control --------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, turns: Any, values: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
        """``for turn in range(turns)`` over ``values``, which the body replaces in place; after it they are the
        last ones. turns is at least 1."""
        b = self._b
        before = b.block
        body = b.append_basic_block("turn")
        after = b.append_basic_block("done")
        b.branch(body)
        b.position_at_end(body)
        turn = b.phi(_I64)
        turn.add_incoming(ir.Constant(_I64, 0), before)
        carried = []
        for value in values:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            carried.append(phi)
        phis = list(carried)
        yield turn, carried
        following = b.add(turn, ir.Constant(_I64, 1))
        turn.add_incoming(following, b.block)
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, turns), body, after)
        b.position_at_end(after)
