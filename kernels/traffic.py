"""What a decode step moves: bytes and a predicted time of adapters as LoRA and as bases with scalings. Not measured.

A launch takes the time of its slowest resource, device memory, L2 or tensor cores, and a fixed cost. Every token has an
adapter of its own. For plain LoRA only what it must move is counted (no programs that find nothing to do), so the
model flatters it. ``gpu_check.py`` measures; its figures replace these where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_jdlora.kernels.packed_module import BLOCK_COLUMNS
from vllm_jdlora.kernels.triton_shrink import Launch

_WIDTH, _SCRATCH_WIDTH = 2, 4  # bytes of a number: bf16 weights and activations, fp32 scratch


@dataclass(frozen=True)
class Card:
    """A GPU in six numbers; rates are what large kernels reach, not data sheets."""

    memory: float  # GB/s
    l2: float  # GB/s
    tensor: float  # TFLOP/s in bf16
    multiprocessors: int
    launch: float  # µs that a launch inside a CUDA graph adds, with the look-ups of its tiles
    lookup: float = 0.5  # µs of it from asking for a tile's cluster to having it: an assumption


CARDS = {
    "A100": Card(memory=2039 * 0.85, l2=4000, tensor=312 * 0.75, multiprocessors=108, launch=2.5),
    "H100": Card(memory=3350 * 0.85, l2=5500, tensor=989 * 0.65, multiprocessors=132, launch=2.0),
    "H200": Card(memory=4800 * 0.85, l2=5500, tensor=989 * 0.65, multiprocessors=132, launch=2.0),
}


@dataclass(frozen=True)
class ModuleShape:
    """A packed module: its input and the outputs of its slices."""

    d_in: int
    widths: tuple[int, ...]

    @property
    def d_out(self) -> int:
        return sum(self.widths)


MISTRAL_7B = {
    "qkv": ModuleShape(4096, (4096, 1024, 1024)),
    "o": ModuleShape(4096, (4096,)),
    "gate_up": ModuleShape(4096, (14336, 14336)),
    "down": ModuleShape(14336, (4096,)),
}
"""The modules of one layer of Mistral-7B, which the paper serves."""


@dataclass(frozen=True)
class Traffic:
    """What a sequence of launches moves.

    Attributes:
        weights: bytes of weights from device memory.
        memory: bytes from device memory in all, each once.
        microseconds: predicted.
    """

    weights: float = 0
    memory: float = 0
    microseconds: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.weights + other.weights, self.memory + other.memory, self.microseconds + other.microseconds)


def _launch(card: Card, *, weights: float, activations: float, again: float = 0, flops: float = 0) -> Traffic:
    """One launch; ``again`` are bytes that L2 serves on top of what memory does."""
    memory = weights + activations
    busy = max(memory / card.memory / 1e3, (memory + again) / card.l2 / 1e3, flops / card.tensor / 1e6)
    return Traffic(weights, memory, card.launch + busy)


def base(shape: ModuleShape, tokens: int, card: Card) -> Traffic:
    """The module itself: one matrix product."""
    numbers = shape.d_in * shape.d_out
    moved = tokens * (shape.d_in + shape.d_out) * _WIDTH
    return _launch(card, weights=_WIDTH * numbers, activations=moved, flops=2 * tokens * numbers)


def stock(shape: ModuleShape, tokens: int, rank: int, card: Card) -> Traffic:
    """Plain LoRA of ``rank`` with an adapter for each token: zero fill, shrink, expand."""
    slices = len(shape.widths)
    hidden = tokens * slices * rank * _SCRATCH_WIDTH
    a, b = tokens * slices * rank * shape.d_in, tokens * rank * shape.d_out
    return (
        _launch(card, weights=0, activations=hidden)
        + _launch(card, weights=_WIDTH * a, activations=tokens * shape.d_in * _WIDTH + hidden, flops=2 * a)
        + _launch(card, weights=_WIDTH * b, activations=2 * tokens * shape.d_out * _WIDTH + hidden, flops=2 * b)
    )


def clusters_used(tokens: int, clusters: int) -> float:
    """How many of equally popular clusters a batch of ``tokens`` tokens is expected to touch."""
    return clusters * (1 - (1 - 1 / clusters) ** tokens)


def compressed(
    shape: ModuleShape,
    tokens: int,
    rank: int,
    clusters: int,
    card: Card,
    *,
    fused: bool | None = None,
    diagonal: bool = False,
    base_bits: int = 16,
    dense: bool | None = None,
    used: float | None = None,
) -> Traffic:
    """Shrink, Σ, expand of ``triton_grouped.py``.

    Args:
        shape: of the module.
        tokens: T, each with an adapter of its own.
        rank: R.
        clusters: K, all equally popular.
        card: the GPU.
        fused: Σ in the expand; None: as serving chooses.
        diagonal: JD-Diag's Σ.
        base_bits: 16, or 8 with a scale for each direction; then Σ V x stays fp32 on its way to the expand.
        dense: the shrink takes the V of all clusters; None: as serving chooses.
        used: clusters that have a token; None: as many as are expected.
    """
    from vllm_jdlora.kernels.triton_grouped import fuses_scaling

    if fused is None:
        fused = fuses_scaling(tokens, rank, batch_invariant=False)
    slices = len(shape.widths)
    sizes = Launch.of(
        tokens,
        clusters,
        slices * rank,
        shape.d_in,
        card.multiprocessors,
        batch_invariant=False,
        number_bytes=base_bits // 8,
        dense=dense,
    )
    used = clusters_used(tokens, clusters) if used is None else used
    tiles = min(tokens, used + tokens / sizes.rows)
    v_tiles, v_used = (sizes.tiles * clusters, clusters) if sizes.dense else (tiles, used)
    v, u = slices * rank * shape.d_in * base_bits // 8, rank * shape.d_out * base_bits // 8
    if base_bits == 8:
        v, u = v + slices * rank * _SCRATCH_WIDTH, u + slices * rank * _SCRATCH_WIDTH
    scalings = tokens * slices * rank * (1 if diagonal else rank) * _WIDTH
    x, y = tokens * shape.d_in * _WIDTH, 2 * tokens * shape.d_out * _WIDTH
    parts = sizes.parts * tokens * slices * rank * _SCRATCH_WIDTH
    scaled = tokens * slices * rank * (_WIDTH if base_bits == 16 else _SCRATCH_WIDTH)
    shrink = _launch(
        card,
        weights=v_used * v,
        activations=x,
        again=(v_tiles - v_used) * v + parts,
        flops=2 * v_tiles * sizes.rows * slices * rank * shape.d_in,
    ) + Traffic(microseconds=-card.lookup if sizes.dense else 0)
    flops = 2 * tiles * sizes.rows * rank * shape.d_out
    # Programs of one slice's columns each read its tokens' part of g, or of h and Σ.
    readers = sum(-(-width // BLOCK_COLUMNS) for width in shape.widths) / slices
    if fused:
        again = (tiles - used) * u + readers * parts + (readers - 1) * scalings
        return shrink + _launch(card, weights=used * u + scalings, activations=y, again=again, flops=flops)
    return (
        shrink
        + _launch(card, weights=scalings, activations=scaled, again=parts)
        + _launch(card, weights=used * u, activations=y, again=(tiles - used) * u + readers * scaled, flops=flops)
    )


def layer(
    shapes: Sequence[ModuleShape],
    tokens: int,
    card: Card,
    rank: int,
    clusters: int,
    *,
    diagonal: bool = False,
    base_bits: int = 16,
) -> Traffic:
    """All modules of a layer as bases and scalings."""
    modules = (
        compressed(shape, tokens, rank, clusters, card, diagonal=diagonal, base_bits=base_bits) for shape in shapes
    )
    return sum(modules, Traffic())


def stock_layer(shapes: Sequence[ModuleShape], tokens: int, card: Card, rank: int) -> Traffic:
    """All modules of a layer as plain LoRA."""
    return sum((stock(shape, tokens, rank, card) for shape in shapes), Traffic())


def base_layer(shapes: Sequence[ModuleShape], tokens: int, card: Card) -> Traffic:
    """The products of a layer that adapters are added to."""
    return sum((base(shape, tokens, card) for shape in shapes), Traffic())
