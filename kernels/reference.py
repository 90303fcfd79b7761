"""What every kernel means, as plain loops in fp32.

Each implementation in this package is compared with these functions; none of them calls another implementation.
"""

from collections.abc import Sequence

import torch


def jd_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    u: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    sigma: torch.Tensor,
    token_cluster: Sequence[int],
    token_slot: Sequence[int],
) -> torch.Tensor:
    """``y[t] + U[c(t)] · (Σ[s(t)] · (V[c(t)] · x[t]))`` for every token and module slice (arXiv 2407.00066, eq. 1).

    Args:
        y: [T, sum of d_out over slices]; slices lie side by side in their order.
        x: [T, d_in].
        u: for each slice [K, d_out, R].
        v: for each slice [K, R, d_in].
        sigma: [slots, slices, R, R] (JD-Full) or [slots, slices, R] (JD-Diag).
        token_cluster: cluster of each token; −1 leaves the token untouched.
        token_slot: scaling slot of each token; −1 leaves the token untouched.

    Returns:
        fp32 [T, sum of d_out]; a new tensor. Untouched rows equal ``y`` exactly.
    """
    out = y.float().clone()
    for t, (cluster, slot) in enumerate(zip(token_cluster, token_slot, strict=True)):
        if cluster < 0 or slot < 0:
            continue
        column = 0
        for i, (u_slice, v_slice) in enumerate(zip(u, v, strict=True)):
            hidden = v_slice[cluster].float() @ x[t].float()
            scaled = apply_scaling(hidden, sigma[slot, i])
            width = u_slice.shape[1]
            out[t, column : column + width] += u_slice[cluster].float() @ scaled
            column += width
    return out


def jd_shrink(x: torch.Tensor, v: Sequence[torch.Tensor], token_cluster: Sequence[int]) -> torch.Tensor:
    """``V[c(t), i] · x[t]`` for every slice i and token t.

    Args:
        x: [T, d_in].
        v: for each slice [K, R, d_in].
        token_cluster: cluster of each token; −1 gives zeros.

    Returns:
        fp32 [slices, T, R].
    """
    out = torch.zeros(len(v), x.shape[0], v[0].shape[1])
    for i, v_slice in enumerate(v):
        for t, cluster in enumerate(token_cluster):
            if cluster >= 0:
                out[i, t] = v_slice[cluster].float() @ x[t].float()
    return out


def jd_expand(
    y: torch.Tensor, g: torch.Tensor, u: Sequence[torch.Tensor], token_cluster: Sequence[int]
) -> torch.Tensor:
    """``y[t] + U[c(t), i] · g[i, t]`` for every slice i and token t.

    Args:
        y: [T, sum of d_out over slices]; slices lie side by side in their order.
        g: [slices, T, R], Σ applied.
        u: for each slice [K, d_out, R].
        token_cluster: cluster of each token; −1 leaves the token untouched.

    Returns:
        fp32 [T, sum of d_out]; a new tensor.
    """
    out = y.float().clone()
    for t, cluster in enumerate(token_cluster):
        column = 0
        for i, u_slice in enumerate(u):
            width = u_slice.shape[1]
            if cluster >= 0:
                out[t, column : column + width] += u_slice[cluster].float() @ g[i, t].float()
            column += width
    return out


def jd_sigma(h: torch.Tensor, sigma: torch.Tensor, token_slot: Sequence[int]) -> torch.Tensor:
    """``Σ[s(t)] · h[i, t]`` for every slice i and token t.

    Args:
        h: [slices, T, R], the result of the shrink.
        sigma: [slots, slices, R, R] (JD-Full) or [slots, slices, R] (JD-Diag).
        token_slot: scaling slot of each token; −1 gives zeros.

    Returns:
        fp32 [slices, T, R]; a new tensor.
    """
    out = torch.zeros_like(h, dtype=torch.float32)
    for i in range(h.shape[0]):
        for t, slot in enumerate(token_slot):
            if slot >= 0:
                out[i, t] = apply_scaling(h[i, t].float(), sigma[slot, i])
    return out


def apply_scaling(hidden: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    """One scaling matrix [R, R] or its diagonal [R] times one vector [R], in fp32."""
    scaling = scaling.float()
    return scaling @ hidden if scaling.ndim == 2 else scaling * hidden
