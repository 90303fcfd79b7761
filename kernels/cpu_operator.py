"""The LoRA linear on CPU as an operator of torch that is compiled code from end to end: no Python runs for a layer.

torch's dispatcher calls it by the C interface that torch keeps stable for libraries of other compilers
(``torch/csrc/inductor/aoti_torch/c/shim.h``). An operator in Python took 7 µs more for each of a model's layers, whose
caches the base model's weights have emptied since the last one.

What differs from layer to layer and from step to step it finds in memory, so that compiled graphs hold no address:
each layer hands in its own `LayerCall.handle`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from vllm_jdlora.kernels import cpu_machine_code
from vllm_jdlora.kernels.cpu_grouped import PackedLinear, TokenGroups
from vllm_jdlora.kernels.cpu_numbers import address_as_pointer

_STEP_FIELDS = 6
_TOKENS, _PLAN, _THREADS, _OTHER_PLAN, _OTHER_THREADS, _MISMATCH = range(_STEP_FIELDS)
_LAYER_FIELDS = 5
_STEP, _RUN, _DATA, _OTHER_RUN, _OTHER_DATA = range(_LAYER_FIELDS)
# Sizes and strides of a tensor, by address, and its data.
_ASKED = 3


class PlanMismatch(RuntimeError):
    """The layers got another number of tokens than the step was planned for.

    Compiled code knows no exceptions: the interpreter raises this one when it goes on after the operator.
    """


class Step:
    """What all layers of a model read of the step that runs: the plans of its bases, and of those in 8 bits."""

    def __init__(self) -> None:
        self._fields = np.zeros(_STEP_FIELDS, dtype=np.int64)
        self._fields[_MISMATCH] = id(PlanMismatch)
        self._layers: list[LayerCall] = []
        self._plans: tuple[TokenGroups, ...] = ()

    @property
    def address(self) -> int:
        address: int = self._fields.ctypes.data
        return address

    def add(self, layer: LayerCall) -> None:
        self._layers.append(layer)

    def take(self, groups: TokenGroups, other: TokenGroups) -> None:
        """Run by these plans from now on; the first that have tokens wait for the kernel's compilation."""
        threads = [0 if plan.empty else plan.threads for plan in (groups, other)]
        if any(threads):
            for layer in self._layers:
                layer.prepare(*threads)
        self._plans = groups, other  # their arrays live as long as they are read
        self._fields[:_MISMATCH] = groups.num_tokens, groups.address, threads[0], other.address, threads[1]


class LayerCall:
    """One layer's call of the operator.

    Attributes:
        handle: int64 tensor of addresses, the operator's third argument.
    """

    def __init__(self, step: Step, packed: PackedLinear, other: PackedLinear | None):
        """other: the layer's bases in 8 bits."""
        self._packed = (packed, other)
        self.handle = torch.zeros(_LAYER_FIELDS, dtype=torch.int64)
        self.handle[_STEP] = step.address
        for place, linear in zip((_DATA, _OTHER_DATA), self._packed, strict=True):
            if linear is not None:
                self.handle[place] = linear.parameters_address
        self._step = step  # whose address the handle has
        step.add(self)

    def prepare(self, threads: int, other_threads: int) -> None:
        """Have room for so many threads, and the compiled code; 0 where that plan has no tokens."""
        for place, linear, count in zip((_RUN, _OTHER_RUN), self._packed, (threads, other_threads), strict=True):
            if linear is not None and count:
                entry = linear.prepare(count).address
                if self.handle[place] != entry:
                    self.handle[place] = entry


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this torch has the interface."""
    return _torch_functions() is not None


def implement(namespace: str, name: str) -> None:
    """Make ``namespace::name(Tensor(a!) y, Tensor x, Tensor handle) -> ()``, which is declared, this operator on CPU:
    ``y += U Σ V x`` as `PackedLinear.add_`, by the plans of the handle's step. Takes half a second at the first time.

    y and x have the dtype of the bases and contiguous rows, which the caller answers for.

    Raises:
        RuntimeError: torch does not take it; or it was made before.
    """
    torch_library = _torch_functions()
    assert torch_library is not None, "ask `available` first"
    libraries = ((torch_library, _OF_TORCH), (ctypes.pythonapi, _OF_PYTHON))
    outside = {
        name: cpu_machine_code.outside(name, cpu_machine_code.address_of(getattr(library, name)), signature)
        for library, signatures in libraries
        for name, signature in signatures.items()
    }
    entry = cpu_machine_code.compiled("operator", (), lambda: _compiled(outside))
    made = ctypes.c_void_p()
    failed = torch_library.aoti_torch_library_init_impl(
        namespace.encode(), b"CPU", __file__.encode(), 1, ctypes.byref(made)
    ) or torch_library.aoti_torch_library_impl(made, name.encode(), entry)
    if failed:
        raise RuntimeError(f"torch {torch.__version__} did not take the operator {namespace}::{name}")
    _kept.append(made)  # for as long as the process lives


_kept: list[Any] = []


_number = types.int64
_OF_TORCH = {
    "aoti_torch_get_data_ptr": types.int32(_number, _number),
    "aoti_torch_get_strides": types.int32(_number, _number),
    "aoti_torch_get_sizes": types.int32(_number, _number),
    "aoti_torch_delete_tensor_object": types.int32(_number),
}
# These raise an exception in a thread. The interpreter's lock is taken by the caller.
_OF_PYTHON = {
    "PyGILState_Ensure": types.int32(),
    "PyThread_get_thread_ident": _number(),
    "PyThreadState_SetAsyncExc": types.int32(_number, _number),
    "PyGILState_Release": types.void(types.int32),
}


@lru_cache(maxsize=1)
def _torch_functions() -> Any:
    """torch's library with the functions that are called; None where one is missing."""
    library = ctypes.CDLL(torch._C.__file__)  # which depends on all of torch
    from_here: dict[str, tuple[Any, ...]] = {
        "aoti_torch_library_init_impl": (*(ctypes.c_char_p,) * 3, ctypes.c_uint32, ctypes.POINTER(ctypes.c_void_p)),
        "aoti_torch_library_impl": (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
    }
    if not all(hasattr(library, name) for name in (*_OF_TORCH, *from_here)):
        return None
    for name, arguments in from_here.items():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    return library


@intrinsic
def _room(context):  # type: ignore[no-untyped-def]
    """Address of `_ASKED` numbers of 64 bits, for as long as the function runs."""

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        room = cgutils.alloca_once(builder, ir.IntType(64), size=_ASKED)
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(), generate


@intrinsic
def _call(context, function, data, x, x_stride, y, y_stride, plan, threads):  # type: ignore[no-untyped-def]
    """`cpu_body.Kernel.run` at the address ``function``."""

    def generate(target: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [number] * 7)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), list(arguments[1:]))
        return target.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


def _compiled(outside: dict[str, Any]) -> Any:
    """outside: the functions that are called, by name."""
    data_of, strides_of = outside["aoti_torch_get_data_ptr"], outside["aoti_torch_get_strides"]
    sizes_of, release = outside["aoti_torch_get_sizes"], outside["aoti_torch_delete_tensor_object"]
    lock, unlock = outside["PyGILState_Ensure"], outside["PyGILState_Release"]
    raise_in, this_thread = outside["PyThreadState_SetAsyncExc"], outside["PyThread_get_thread_ident"]
    carray, int64 = numba.carray, np.int64

    @numba.cfunc(types.void(types.voidptr, types.uint64, types.uint64), error_model="numpy")
    def operator(stack: Any, inputs: int, outputs: int) -> None:
        tensors = carray(stack, 3, int64)  # owned by this function
        room = _room()
        found = carray(address_as_pointer(room), _ASKED, int64)

        data_of(tensors[2], room)
        layer = carray(address_as_pointer(found[0]), _LAYER_FIELDS, int64)
        step = carray(address_as_pointer(layer[_STEP]), _STEP_FIELDS, int64)
        if step[_THREADS] or step[_OTHER_THREADS]:
            sizes_of(tensors[1], room)
            if carray(address_as_pointer(found[0]), 2, int64)[0] != step[_TOKENS]:
                held = lock()
                raise_in(this_thread(), step[_MISMATCH])
                unlock(held)
            else:
                data_of(tensors[0], room)
                data_of(tensors[1], room + 8)
                y, x = found[0], found[1]
                strides_of(tensors[0], room)
                strides_of(tensors[1], room + 8)
                y_stride = carray(address_as_pointer(found[0]), 2, int64)[0]
                x_stride = carray(address_as_pointer(found[1]), 2, int64)[0]
                if step[_THREADS]:
                    _call(layer[_RUN], layer[_DATA], x, x_stride, y, y_stride, step[_PLAN], step[_THREADS])
                if step[_OTHER_THREADS]:
                    _call(
                        layer[_OTHER_RUN],
                        layer[_OTHER_DATA],
                        x,
                        x_stride,
                        y,
                        y_stride,
                        step[_OTHER_PLAN],
                        step[_OTHER_THREADS],
                    )
        for i in range(3):
            release(tensors[i])

    return operator
