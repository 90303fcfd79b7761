"""Where JD-Diag's sweeps start: rank-one terms of several kinds, for the best of them to go on."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_jdlora.jd.diag_sweeps import Rows

# Shares of energy below this are rounding.
_NO_ENERGY = 1e-13


def starts(rows: Rows, rank: int) -> list[tuple[Tensor, Tensor]]:
    """(A [p, columns], B [q, columns]) of several kinds, each filled up with the adapters' strongest terms."""
    terms_a, terms_b = _strongest_terms(rows, rank)
    columns = terms_a.shape[1]
    p, q = rows.left.shape[1], rows.right.shape[1]
    width = min(columns, p, q)
    mean = torch.linalg.svd((rows.left.T @ rows.right).double(), full_matrices=False)
    pairs = [
        (terms_a, terms_b),
        (torch.eye(p, width).to(terms_a), torch.eye(q, width).to(terms_a)),
        (mean.U[:, :width], mean.Vh[:width].T),
    ]
    if min(rows.m, width) > 1:
        pairs.append(simultaneous(rows, width))
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randn(size, columns, generator=draw).to(terms_a) for size in (p, q))
    pairs.append((next(drawn), next(drawn)))
    return [(torch.cat([a, terms_a], 1)[:, :columns], torch.cat([b, terms_b], 1)[:, :columns]) for a, b in pairs]


def _strongest_terms(rows: Rows, rank: int) -> tuple[Tensor, Tensor]:
    """Singular pairs of single members, picked by the energy that those picked before leave of them.

    rows: by singular directions. (A [p, columns], B [q, columns]), columns ≤ rank: fewer when these terms already give
    every member exactly. With adapters that share nothing this is the best rank for each adapter's own SVD.
    """
    energy, order = rows.left.double().square().sum(1).sort(descending=True, stable=True)
    order = order[energy > _NO_ENERGY * energy[0]][: 4 * rank + rows.m]
    a, b = rows.left[order].double().T, rows.right[order].double().T
    s = a.norm(dim=0)
    a = a / s
    kernel = (a.T @ a) * (b.T @ b) * s[:, None] * s
    left, chosen = kernel.diagonal().clone(), []  # pivoted Cholesky
    done = kernel.new_zeros(len(s), 0)
    for _ in range(min(rank, len(s))):
        pivot = int(left.argmax())
        if float(left[pivot]) <= _NO_ENERGY * float(kernel.diagonal().max()):
            break
        column = (kernel[:, pivot] - done @ done[pivot]) / left[pivot].sqrt()
        done = torch.cat([done, column[:, None]], 1)
        left = left - column.square()
        left[pivot] = 0
        chosen.append(pivot)
    return a[:, chosen], b[:, chosen]


def simultaneous(rows: Rows, width: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of M₁M₂⁻¹ for two mixtures of the leading blocks: exact where the members have such a form.

    (Direct trilinear decomposition: M_j = A D_j Bᵀ gives M₁M₂⁻¹ = A D₁D₂⁻¹ A⁻¹.) A complex pair gives its real and
    imaginary part.
    """
    left, right = (side[:, :width].double().unflatten(0, (rows.m, -1)) for side in (rows.left, rows.right))
    block = left.mT @ right
    flat = block.flatten(1)
    mix = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -2:].flip(1)
    one, two = torch.einsum("mj,mab->jab", mix, block)
    values, vectors = torch.linalg.eig(one @ torch.linalg.pinv(two, rtol=1e-12))
    turned = torch.where(values.imag < 0, vectors.imag, vectors.real)
    back = (torch.linalg.pinv(turned, rtol=1e-12) @ two).T
    a, b = flat.new_zeros(rows.left.shape[1], width), flat.new_zeros(rows.right.shape[1], width)
    a[:width], b[:width] = turned, back
    return a, b
