"""Machine code of the CPU kernels, kept on disk: numba and LLVM take seconds to make it, and the same at every start.

The code holds no address of this process. What it calls outside of itself has a name (`outside`), which LLVM looks up
when the code is loaded; whatever else it needs is handed in. Files lie in the folder of vLLM's own compiled code
(``VLLM_CACHE_ROOT``), which who may write there is trusted with as much. A file that is missing, damaged or not
writable costs the seconds and nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core import types
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_jdlora.atomic_file import replacing

logger = logging.getLogger(__name__)

FOLDER = "jdlora_kernels"
_OBJECT, _ENTRY = "object", "entry"
_loaded: list[Any] = []
"""Engines, whose code is called as long as the process lives."""


def outside(name: str, address: int, signature: Any) -> Any:
    """A C function of this process, for numba's code to call; before code is loaded that does."""
    llvm.add_symbol(name, address)
    return types.ExternalFunction(name, signature)


def address_of(function: Any) -> int:
    """Of a C function that ctypes knows."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def compiled(title: str, made_of: object, make: Callable[[], Any]) -> int:
    """Address of a C function: as it was kept, or of what ``make`` gives (a ``numba.cfunc``), which is kept then.

    Args:
        title: of the function among those of this folder.
        made_of: what ``make`` depends on besides the sources in this folder and the processor; its ``repr`` counts.
    """
    file = folder() / f"{title}-{_digest(title, made_of)}.safetensors"
    code = _read(file)
    if code is None:
        code = _object_of(make())
        _keep(file, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _loaded.append(engine)
    address: int = engine.get_function_address(_ENTRY)
    return address


def folder() -> Path:
    """Where the files are."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("VLLM_CACHE_ROOT") or f"{home}/vllm").expanduser() / FOLDER


def _digest(title: str, made_of: object) -> str:
    parts = [title, repr(made_of), _sources(), numba.__version__, llvmlite.__version__, *_processor()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _processor() -> tuple[str, str]:
    """Name and features, as numba takes them."""
    name = numba.config.CPU_NAME or llvm.get_host_cpu_name()
    features = numba.config.CPU_FEATURES
    return name, llvm.get_host_cpu_features().flatten() if features is None else features


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _processor()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=name, features=features, opt=3, codemodel="jitdefault", jit=True)


def _object_of(function: Any) -> bytes:
    """The function as object code under the name `_ENTRY`, with all that it calls of its own.

    numba's own C wrapper stays out: it can tell of errors, which there are none of, by functions of numba's that would
    have to be there when the code is loaded. A function of numba's takes two addresses before its arguments, for its
    result and for an error.
    """
    inner = function.native_name.removeprefix("cfunc.")
    module = llvm.parse_assembly(function.inspect_llvm())
    kinds = [str(argument.type) for argument in module.get_function(function.native_name).arguments]
    taken = ", ".join(f"{kind} %{i}" for i, kind in enumerate(kinds))
    entry = f"""
        define void @{_ENTRY}({taken}) {{
          %result = alloca ptr
          %error = alloca ptr
          %status = call i32 @"{inner}"(ptr %result, ptr %error, {taken})
          ret void
        }}
        declare i32 @"{inner}"(ptr, ptr, {", ".join(kinds)})
    """
    module.link_in(llvm.parse_assembly(entry))
    for part in (*module.functions, *module.global_variables):
        if part.name != _ENTRY and not part.is_declaration:
            part.linkage = llvm.Linkage.internal
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options(0)))
    code: bytes = _machine().emit_object(module)
    return code


def _read(file: Path) -> bytes | None:
    """The code, where the file is whole."""
    try:
        with safe_open(file, "numpy") as opened:
            digest, code = (opened.metadata() or {}).get("sha256"), opened.get_tensor(_OBJECT).tobytes()
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is not read and made anew: %s", file, error)
        return None
    if digest != hashlib.sha256(code).hexdigest():
        logger.warning("%s is damaged and made anew", file)
        return None
    return code


def _keep(file: Path, code: bytes) -> None:
    data = save({_OBJECT: np.frombuffer(code, np.uint8)}, {"sha256": hashlib.sha256(code).hexdigest()})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            new.write_bytes(data)
    except OSError as error:
        logger.warning("the compiled kernel is not kept for the next start: %s", error)
