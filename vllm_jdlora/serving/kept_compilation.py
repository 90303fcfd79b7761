"""On CPU a model that an earlier start compiled is taken from disk, as vLLM does on CUDA.

vLLM keeps what it compiles in any case, and on CPU (0.32, 0.33) cannot load it: it finishes loading by a method that
only the functions of its own compiler backend have, and on CPU inductor compiles alone. So every start compiles again,
which is most of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def loads() -> Iterator[None]:
    """While this lasts, a compiled function that has nothing left to load says so when vLLM asks it to."""
    stock = torch.compiler.load_compiled_function

    def load(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = stock(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = _all_there
        return loaded

    torch.compiler.load_compiled_function = load
    try:
        yield
    finally:
        torch.compiler.load_compiled_function = stock


def _all_there(vllm_config: Any) -> None:
    """Nothing is left to load."""
