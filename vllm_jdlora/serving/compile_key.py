"""The serving options as a part of vLLM's compile key: compiled code serves any collection.

vLLM keeps compiled models on disk under a digest of its whole configuration. The code that it compiles here holds the
places of layers and an operator that it does not look into, no sizes and no paths of a collection: without this a
server would compile for a minute whenever its collection has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_jdlora.serving.options import CONFIG_KEY, IN_PYTHON

_PROCESSOR = Path("/proc/cpuinfo")
_ABOUT = ("vendor_id", "model name", "flags", "Features")


class CompileKey(Mapping[str, Any]):
    """``additional_config`` as it was, with a digest that leaves our options out (vLLM's ``SupportsHash``).

    Which modules are wrapped, and how wide LoRA buffers are, is in the digest of vLLM's own LoRA configuration.
    """

    def __init__(self, additional_config: Mapping[str, Any]):
        self._values = dict(additional_config)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def compute_hash(self) -> str:
        """Hexadecimal; equal for options of equal effect on compiled code."""
        others = {key: value for key, value in self._values.items() if key != CONFIG_KEY}
        compiled = {
            "compression": CONFIG_KEY in self._values,
            "python": bool(os.environ.get(IN_PYTHON)),  # graphs call one of two operators
            "processor": _processor(),
            **others,
        }
        return hashlib.sha256(json.dumps(compiled, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=1)
def _processor() -> str:
    """What tells processors apart: code for CPUs is compiled for the one at hand, which vLLM's key does not name."""
    try:
        lines = _PROCESSOR.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(_ABOUT))
