"""Writes the CPU kernel's tiles as LLVM instructions, with names for what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import ir

from vllm_jdlora.kernels.cpu_layout import Form, magnitudes

_I64, _I32, _I16, _I8, _FLOAT = *(ir.IntType(bits) for bits in (64, 32, 16, 8)), ir.FloatType()
# Localities of `llvm.prefetch`. AMD's and Intel's processors take 0 past the second cache: bases are read once a step,
# and there they would push out what the base model reads.
_ONCE, _SECOND_CACHE, _NEAREST = 0, 1, 3


class _BFloat(ir.Type):
    """bf16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def generating(body: Callable[..., None]) -> Callable[..., Any]:
    def generate(target: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        body(Code(builder), *values)
        return target.get_dummy_value()

    return generate


class Code:
    """Writes LLVM instructions at the builder's place."""

    def __init__(self, builder: ir.IRBuilder):
        self._b = builder

    # --- addresses ------------------------------------------------------------------------------------------------

    def add(self, a: Any, b: Any) -> Any:
        return self._b.add(a, b)

    def plus(self, a: Any, number: int) -> Any:
        return self._b.add(a, ir.Constant(_I64, number))

    def times(self, a: Any, b: Any) -> Any:
        return self._b.mul(a, ir.Constant(_I64, b) if isinstance(b, int) else b)

    def load_i64(self, address: Any, offset: int) -> Any:
        return self._load(self.plus(address, offset), _I64, 8)

    def _load(self, address: Any, kind: ir.Type, align: int) -> Any:
        pointer = self._b.inttoptr(address, kind.as_pointer())
        return self._b.load(pointer, align=align, typ=kind)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        self._b.store(value, self._b.inttoptr(address, value.type.as_pointer()), align=align)

    def fetch_once(self, address: Any) -> None:
        """Ask for a line of data that is read soon and then not again."""
        self._fetch(address, _ONCE)

    def fetch_second(self, address: Any) -> None:
        """Ask for a line of data that is read in a while."""
        self._fetch(address, _SECOND_CACHE)

    def fetch_near(self, address: Any) -> None:
        """Ask for a line of data that is read soon."""
        self._fetch(address, _NEAREST)

    def _fetch(self, address: Any, locality: int) -> None:
        pointer = self._b.inttoptr(address, ir.IntType(8).as_pointer())
        read, kept, data = (ir.Constant(_I32, number) for number in (0, locality, 1))
        self._call("llvm.prefetch.p0", ir.VoidType(), [pointer, read, kept, data])

    # --- vectors --------------------------------------------------------------------------------------------------

    def zeros(self, lanes: int) -> Any:
        return ir.Constant(ir.VectorType(_FLOAT, lanes), [0.0] * lanes)

    def load(self, address: Any, lanes: int, form: Form, what: str) -> Any:
        """A vector of x or of a basis, as `product` takes it."""
        if form.pairs:
            raw = self._load(address, ir.VectorType(_I32, lanes), 1)
            return self._b.bitcast(raw, ir.VectorType(_BFloat(), 2 * lanes))
        if what == "basis" and form.eight_bit is not None:
            return self._of_8_bits(address, lanes, form)
        if what == "basis" and form.stored == torch.bfloat16:
            return self._widened(self._load(address, ir.VectorType(_I16, lanes), 1), lanes)
        return self._load(address, ir.VectorType(_FLOAT, lanes), 1)

    def _of_8_bits(self, address: Any, lanes: int, form: Form) -> Any:
        """int8 or fp8 as fp32."""
        integers, floats = ir.VectorType(_I32, lanes), ir.VectorType(_FLOAT, lanes)
        wide = self._b.sext(self._load(address, ir.VectorType(_I8, lanes), 1), integers)
        if form.eight_bit == torch.int8:
            return self._b.sitofp(wide, floats)
        # Sign, four bits of exponent, three of mantissa into fp32's places, whose exponents count from 120 lower.
        moved = self._b.and_(
            self._b.shl(wide, ir.Constant(integers, [20] * lanes)), ir.Constant(integers, [0x87F00000] * lanes)
        )
        return self._b.fmul(self._b.bitcast(moved, floats), ir.Constant(floats, [2.0**120] * lanes))

    def load_two(self, address: Any, form: Form) -> list[Any]:
        """A vector of a basis and the next.

        Numbers of 8 bits for products of pairs go through tables of 128 bytes in registers, one for the lower byte of
        a bf16 number and one for the upper, since no instruction makes bf16 of them: exact for int8 and for fp8, whose
        smallest numbers are subnormal. On Zen 5 a layer of SmolLM2-135M (32 tokens, bases in memory, one core) took
        83 µs so, 103 µs through fp32 (int8), 85 µs by shifts (fp8, without numbers near 0), and 120 µs in 16 bits.
        """
        if not form.looked_up:
            apart = (address, self.plus(address, form.vector_bytes))
            return [self.load(at, form.lanes, form, "basis") for at in apart]
        assert form.eight_bit is not None
        size = 2 * form.step
        numbers = self._load(address, ir.VectorType(_I8, size), 1)
        bits = magnitudes(form.eight_bit).bfloat16().view(torch.int16)
        low, high = (self._looked_up(part, numbers) for part in (bits & 0xFF, bits >> 8))
        sign = self._b.and_(numbers, ir.Constant(numbers.type, [0x80] * size))
        high = self._b.or_(high, sign)
        kind = ir.VectorType(_BFloat(), form.step)
        found = []
        for half in (0, 8):
            mask = [
                i + part
                for lane in range(0, size, 16)
                for i in range(lane + half, lane + half + 8)
                for part in (0, size)
            ]
            found.append(self._b.bitcast(self._b.shuffle_vector(low, high, self._mask(mask)), kind))
        return found

    def _looked_up(self, table: torch.Tensor, places: Any) -> Any:
        """Of a table of 128 bytes those that the lower 7 bits of 64 bytes name."""
        first, second = (ir.Constant(places.type, part.tolist()) for part in table.split(64))
        return self._call("llvm.x86.avx512.vpermi2var.qi.512", places.type, [first, places, second])

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

    def plus_each(self, a: Any, b: Any) -> Any:
        return self._b.fadd(a, b)

    def sums_of(self, vectors: list[Any]) -> Any:
        """The sum over the lanes of each of L vectors of L lanes, as one vector."""
        # Within fours first: shuffles inside 128 bits are the quickest, and need no table.
        pairs = self._two_by_two(vectors, (0, 4, 1, 5), (2, 6, 3, 7), self._within_fours)
        fours = self._two_by_two(pairs, (0, 1, 4, 5), (2, 3, 6, 7), self._within_fours)
        if len(vectors) == 16:
            fours = self._two_by_two(fours, (0, 1, 4, 5), (2, 3, 6, 7), self._of_fours)
            return self._two_by_two(fours, (0, 2, 4, 6), (1, 3, 5, 7), self._of_fours)[0]
        return self._two_by_two(fours, (0, 2), (1, 3), self._of_fours)[0]

    def _two_by_two(
        self, vectors: list[Any], low: tuple[int, ...], high: tuple[int, ...], mask: Callable[..., Any]
    ) -> list[Any]:
        """Of each two vectors the lanes ``low`` plus the lanes ``high``."""
        low_mask, high_mask = mask(low, vectors[0].type.count), mask(high, vectors[0].type.count)
        return [
            self._b.fadd(self._b.shuffle_vector(a, b, low_mask), self._b.shuffle_vector(a, b, high_mask))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]

    def _within_fours(self, picks: tuple[int, ...], lanes: int) -> Any:
        """In each four lanes of two vectors, 0…3 of the first and 4…7 of the second."""
        return self._mask([four + p % 4 + p // 4 * lanes for four in range(0, lanes, 4) for p in picks])

    def _of_fours(self, picks: tuple[int, ...], lanes: int) -> Any:
        """Whole fours of lanes, numbered through two vectors."""
        return self._mask([4 * p + i for p in picks for i in range(4)])

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
