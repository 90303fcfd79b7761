"""The running vLLM against the register, in each process for the names that it uses, before anything is served."""

from __future__ import annotations

import importlib
import inspect
import os
from importlib import metadata
from typing import Any

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.touchpoints.register import REGISTER
from vllm_jdlora.serving.touchpoints.touchpoint import Touchpoint

VERIFIED_VERSIONS = ("0.32", "0.33")
ALLOW_UNVERIFIED = "JDLORA_ALLOW_UNVERIFIED_VLLM"


def check(where: str) -> None:
    """Compare the running vLLM with the register.

    Args:
        where: ``frontend``, ``engine``, ``worker``, ``cuda``, ``metrics`` or ``api_server``; ``cuda`` includes
            ``worker``.

    Raises:
        JDLoRAError: with every difference and what to do.
    """
    kinds = {"worker", "cuda"} if where == "cuda" else {where}
    differences = [d for point in REGISTER if point.where in kinds and (d := _difference(point))]
    version = metadata.version("vllm")
    if not version.startswith(tuple(f"{v}." for v in VERIFIED_VERSIONS)) and not os.environ.get(ALLOW_UNVERIFIED):
        differences.append(f"version {version} has not been verified (set {ALLOW_UNVERIFIED}=1 to try it)")
    if differences:
        raise JDLoRAError(
            f"vllm {version} does not fit this vllm_jdlora, which is verified with {' and '.join(VERIFIED_VERSIONS)}: "
            + "; ".join(differences)
            + ". Install a verified vllm, or a newer vllm_jdlora."
        )


def _difference(point: Touchpoint) -> str | None:
    try:
        target: Any = importlib.import_module(point.module)
        for part in point.name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        return f"{point.module}.{point.name} is missing ({error})"
    if point.uses and (missing := [name for name in point.uses if name not in _names_in(target)]):
        return f"{point.module}.{point.name} no longer uses {', '.join(missing)}"
    if not point.parameters:
        return None
    present = list(inspect.signature(target).parameters)
    wanted = [p for p in point.parameters if p in present]
    if list(point.parameters) != wanted or sorted(wanted, key=present.index) != wanted:
        return f"{point.module}.{point.name} takes ({', '.join(present)}), not ({', '.join(point.parameters)})"
    return None


def _names_in(function: Any) -> tuple[str, ...]:
    return inspect.unwrap(function).__code__.co_names
