"""An entry of the register of vLLM names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Touchpoint:
    """One name of vLLM.

    Attributes:
        module: import path.
        name: attribute path inside the module, ``Class.method`` for methods.
        how: ``subclass``, ``wrap``, ``override``, ``call`` or ``read``.
        why: what it is used for.
        parameters: parameters that must exist, in this order among the others; empty for no check.
        uses: names that the function's own code must mention: what it reads, and what it calls that we replace.
        where: ``frontend`` names are checked in every process, ``engine`` names in the engine core, ``worker`` names
            in the workers, ``cuda`` names in workers on CUDA, ``metrics`` names in an API server's statistics,
            ``api_server`` names in its serving of requests.
    """

    module: str
    name: str
    how: str
    why: str
    parameters: tuple[str, ...] = ()
    where: str = "worker"
    uses: tuple[str, ...] = ()
