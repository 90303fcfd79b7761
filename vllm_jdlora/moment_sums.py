"""Sums of outer products of what passes a model's modules, and of the gradients that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_jdlora.errors import JDLoRAError


@contextmanager
def watching(modules: dict[str, nn.Module], see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    def hook(key: str) -> Callable[..., None]:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            see(key, arguments[0])

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_groups(sides: Mapping[str, int], limit: int) -> list[set[str]]:
    """Keys of square fp64 matrices [d, d] in groups of at most so many bytes, or of one matrix."""
    groups: list[set[str]] = []
    room = 0
    for key, side in sides.items():
        room -= 8 * side**2
        if room < 0:
            groups.append(set())
            room = limit - 8 * side**2
        groups[-1].add(key)
    return groups


def mapped(matrices: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    save_file(matrices, file)
    with safe_open(file, framework="pt") as content:
        return {key: content.get_tensor(key) for key in matrices}


class Sums:
    """Σ xxᵀ in fp64 for each key, over all positions but the first of each text."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, key: str, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])[1:].float()
        if key not in self._sums:
            self._sums[key] = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
        self._sums[key] += x.T @ x

    def means(self, count: int) -> dict[str, Tensor]:
        """Raises JDLoRAError where a sum is not finite."""
        for key, total in self._sums.items():
            if not bool(total.isfinite().all()):
                raise JDLoRAError(f"the input of {key} is not finite on the calibration text: try --dtype fp32")
        # Products of fp32 blocks are symmetric up to rounding: made exactly so.
        return {key: ((total + total.T) / (2 * count)).float().cpu() for key, total in self._sums.items()}


@contextmanager
def differentiated(modules: dict[str, nn.Module], see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """`see(key, gradient at the module's output)` at each step back; parameters need no gradients for it."""

    def hook(key: str) -> Callable[..., Tensor]:
        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The first modules' outputs depend on nothing that is differentiated: their graph begins here.
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            output.register_hook(lambda gradient: see(key, gradient))
            return output

        return after

    handles = [module.register_forward_hook(hook(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
