"""The paper's JD-Full as its authors published it, to compare with: random start, ten alternations, k-means on Σ.

Their `compression.full_lora_pca` (github.com/bruel-gabrielsson/LoRALoLA) and Appendix A.3; never better than `full`
and `clustering` by design, and kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.baselines import BaselineFit, nothing_like
from vllm_jdlora.jd.problem import Factors, squared_norm

# As in the authors' code: extra columns and power steps of the randomised SVD, and alternations.
_OVERSAMPLING, _POWER_STEPS, ALTERNATIONS = 2, 2, 10
# Draws of k-means; the tightest counts.
_DRAWS, _LLOYD_STEPS = 10, 100

Member = tuple[Tensor, Tensor]
"""(b [d_out, ρ], a [ρ, d_in]) fp32 of one adapter as it enters the fit."""


def jd_published(
    factors: Sequence[Factors | None],
    rank: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    unit_norm: bool = True,
) -> BaselineFit:
    """ΔW_i ≈ U_k Σ_i V_kᵀ with Σ_i = U_kᵀ ΔW_i V_k, K bases by `labels` [n] int64 (default: one cluster).

    unit_norm: adapters are fitted with norm one and their norm goes back into Σ_i (the paper's final experiments);
    otherwise those of large norm count more. Stored: U_k, V_k of each cluster that has members here, and R × R
    numbers for each member. Raises JDLoRAError for rank < 1.
    """
    if rank < 1:
        raise JDLoRAError(f"rank {rank}: give a rank of at least 1")
    members = unit_members(factors, unit_norm)
    cluster = {i: 0 if labels is None else int(labels[i]) for i in members}
    kept = nothing_like(factors)
    numbers = 0
    for k in sorted(set(cluster.values())):
        own = [i for i in members if cluster[i] == k]
        u, v = bases([members[i] for i in own], rank, seed + k)
        numbers += u.numel() + v.numel() + len(own) * u.shape[1] * v.shape[1]
        right = v.T.contiguous()
        for i in own:
            f = factors[i]
            assert f is not None
            kept[i] = Factors(u @ ((u.T @ f.b) @ (f.a @ v)), right)
    return BaselineFit(kept, numbers)


def published_labels(
    slices: Sequence[Sequence[Factors | None]],
    rank: int,
    clusters: int,
    *,
    seed: int = 0,
    rounds: int = 10,
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Labels [n] int64 of the paper's clusters: k-means on Σ_i of one common basis, then fit and reassign in turn.

    Features are each adapter's Σ_i of all slices, concatenated and of unit norm (without which adapters of large norm
    become clusters of their own). An adapter moves to the cluster with the least Σ_slices ‖ΔW − UΣV‖²/‖ΔW‖²; at most
    `rounds` times. A cluster that loses all members stays empty. slices[m][i]: adapter i in slice m, read again in
    each round. report: called as (passes over the slices done, most there can be).
    """
    report = report or (lambda done, most: None)
    n = len(slices[0])
    features = torch.cat([_sigmas(factors, rank, seed) for factors in slices], 1)
    labels = _k_means(torch.nn.functional.normalize(features, dim=1), clusters, seed)
    report(1, rounds + 1)
    for done in range(rounds):
        captured = torch.zeros(n, clusters, dtype=torch.float64)
        for factors in slices:
            members = unit_members(factors, True)
            for k in range(clusters):
                own = [pair for i, pair in members.items() if labels[i] == k]
                if own:
                    u, v = bases(own, rank, seed + k)
                    for i, (b, a) in members.items():
                        captured[i, k] += float(((u.T @ b) @ (a @ v)).double().square().sum())
        moved = captured.argmax(1)
        report(done + 2, rounds + 1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def bases(
    members: Sequence[Member], rank: int, seed: int, *, alternations: int = ALTERNATIONS
) -> tuple[Tensor, Tensor]:
    """U [d_out, ≤ rank], V [d_in, ≤ rank]: QR of Gaussians, then ten times U from [W_1V … W_nV], V with the new U.

    With fewer alternations, what the same seed has then.
    """
    draw = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(size, rank, generator=draw).to(members[0][0])).Q
        for size in (members[0][0].shape[0], members[0][1].shape[1])
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # svd_lowrank draws from the global generator
        for _ in range(alternations):
            u = _leading(torch.cat([b @ (a @ v) for b, a in members], 1), rank)
            v = _leading(torch.cat([a.T @ (b.T @ u) for b, a in members], 1), rank)
    return u, v


def _leading(matrix: Tensor, rank: int) -> Tensor:
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    return torch.svd_lowrank(matrix, q=width, niter=_POWER_STEPS)[0][:, :rank]


def unit_members(factors: Sequence[Factors | None], unit_norm: bool = True) -> dict[int, Member]:
    """Position → factors of those whose product is not zero, each with norm one if asked for."""
    members = {}
    for i, f in enumerate(factors):
        norm = 0.0 if f is None else float(squared_norm(f.b, f.a).sqrt())
        if f is not None and norm > 0:
            members[i] = (f.b / norm if unit_norm else f.b, f.a)
    return members


def _sigmas(factors: Sequence[Factors | None], rank: int, seed: int) -> Tensor:
    """[n, R²] Σ_i on one common basis, adapters of norm one; zero for those that have nothing here."""
    members = unit_members(factors, True)
    out = torch.zeros(len(factors), rank * rank)
    if not members:
        return out
    u, v = bases(list(members.values()), rank, seed)
    for i, (b, a) in members.items():
        sigma = torch.zeros(rank, rank)
        sigma[: u.shape[1], : v.shape[1]] = (u.T @ b) @ (a @ v)
        out[i] = sigma.flatten()
    return out


def _k_means(points: Tensor, clusters: int, seed: int) -> Tensor:
    """Labels [n] int64 of points [n, D]: k-means++ starts, Lloyd's steps, the tightest of several draws."""
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for number in range(_DRAWS):
        draw = torch.Generator().manual_seed(seed + number)
        centres = points[torch.randint(len(points), (1,), generator=draw)]
        while len(centres) < clusters:
            nearest = torch.cdist(points, centres).square().min(1).values
            odds = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
            centres = torch.cat([centres, points[torch.multinomial(odds, 1, generator=draw)]])
        labels = torch.full((len(points),), -1)
        for _ in range(_LLOYD_STEPS):
            distance, new = torch.cdist(points, centres).min(1)
            if torch.equal(new, labels):
                break
            labels = new
            for k in labels.unique().tolist():
                centres[k] = points[labels == k].mean(0)
        if float(distance.square().sum()) < least:
            best, least = labels, float(distance.square().sum())
    return best
