"""How far a variant's ΔW is from the adapter's own: relative error, and output error in the activation metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_jdlora.evaluation.variant import Update


def error(original: Update, approximation: Update, moments: Mapping[str, Tensor] | None = None) -> float:
    """Relative error ‖ΔW − ΔW'‖ / ‖ΔW‖ (not squared) over all slices; with moments the output error.

    With the second moments C = E[x xᵀ] of each slice's input, ‖D‖² becomes E‖D x‖² = tr(D C Dᵀ), so that the result
    is √(E‖(ΔW − ΔW')x‖² / E‖ΔW x‖²). D = B A − B' A' is kept as [B, −B'] [A; A'], with
    ‖[B, −B'] [A; A']‖² = tr(G_B G_A) and G the Gram matrices of the stacked factors in fp64: no d_out × d_in matrix,
    and no difference of two large squares but that inside fp64's 1e-16, i.e. errors down to about 1e-8.

    Args:
        original: the adapter's own ΔW.
        approximation: what stands for it; a slice that is left out counts as ΔW' = 0.
        moments: slice name → [d_in, d_in]; slices without one count with C = I only if no slice has one.

    Returns:
        The error; 0 for a zero adapter that stays zero, infinity for one that does not.

    Raises:
        KeyError: moments are given but not for one of the slices.
    """
    lost, energy = 0.0, 0.0
    for name in original.keys() | approximation.keys():
        moment = None if moments is None else moments[name]
        mine, other = original.get(name), approximation.get(name)
        if mine is not None:
            energy += _energy([mine[0]], [mine[1]], moment)
        pairs = [(pair[0] * sign, pair[1]) for pair, sign in ((mine, 1.0), (other, -1.0)) if pair is not None]
        lost += _energy([b for b, _ in pairs], [a for _, a in pairs], moment)
    if lost == 0:
        return 0.0
    return (lost / energy) ** 0.5 if energy else float("inf")


def digest(update: Update) -> str:
    """SHA-256 of an update's numbers: the same for the same factors, whatever they are called."""
    sha256 = hashlib.sha256()
    for name in sorted(update):
        for side in update[name]:
            sha256.update(f"{name} {list(side.shape)}".encode())
            sha256.update(side.float().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def _energy(left: list[Tensor], right: list[Tensor], moment: Tensor | None) -> float:
    """‖[B…] [A…]‖² (in the metric C on the input side), by the Gram matrices of the stacked factors."""
    b, a = torch.cat(left, dim=1).double(), torch.cat(right).double()
    weighted = a if moment is None else a @ moment.double()
    return max(0.0, float(((b.T @ b) * (weighted @ a.T)).sum()))
