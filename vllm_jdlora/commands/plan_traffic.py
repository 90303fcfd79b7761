"""`jdlora plan --traffic`: bytes and a predicted time of adapters in a decode step on a GPU, plain and compressed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_PACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_PACKED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""What vLLM makes one module of, if its parts lie in one parent and have one input."""
_TOKENS = (1, 8, 32, 128, 256)
_DEFAULT_CARD = "H100"
_MEGABYTE = 1e6


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--traffic",
        nargs="?",
        const=_DEFAULT_CARD,
        choices=("A100", "H100", "H200"),
        metavar="GPU",
        help=f"predicted bytes and time of adapters in a decode step (A100, H100, H200; default: {_DEFAULT_CARD})",
    )


def traffic_of(
    slices: Iterable[tuple[str, int, int]],
    *,
    rank: int,
    clusters: int,
    adapter_rank: int,
    diagonal: bool = False,
    card: str = _DEFAULT_CARD,
    tokens: Iterable[int] = _TOKENS,
) -> dict[str, Any]:
    """Predictions of the traffic model for batches in which every sequence has an adapter of its own.

    Args:
        slices: name, d_out and d_in of each slice that adapters change.
        rank: R of the bases.
        clusters: K.
        adapter_rank: rank of the uncompressed adapters.
        diagonal: JD-Diag's scalings, R numbers each.
        card: of ``vllm_jdlora.kernels.traffic.CARDS``.
        tokens: batch sizes.

    Returns:
        ``gpu`` and for each batch size in ``steps`` bytes of weights, microseconds, and the share of the base model's
        time in the modules that adapters change, for plain LoRA, compressed, and compressed with bases of 8 bits.
    """
    from vllm_jdlora.kernels import traffic

    modules = _modules(slices)
    gpu = traffic.CARDS[card]
    steps = []
    for count in tokens:
        base = traffic.base_layer(modules, count, gpu)
        plain = traffic.stock_layer(modules, count, gpu, adapter_rank)
        ours, eight_bit = (
            traffic.layer(modules, count, gpu, rank, clusters, diagonal=diagonal, base_bits=bits) for bits in (16, 8)
        )
        step: dict[str, Any] = {"sequences": count, "base": {"bytes": base.weights, "microseconds": base.microseconds}}
        for name, moved in (("plain", plain), ("compressed", ours), ("compressed_8_bit", eight_bit)):
            share = moved.microseconds / base.microseconds
            step[name] = {"bytes": moved.weights, "microseconds": moved.microseconds, "share_of_base": share}
        steps.append(step)
    return {"gpu": card, "rank": rank, "clusters": clusters, "adapter_rank": adapter_rank, "steps": steps}


def show_traffic(facts: Mapping[str, Any], show: Callable[[str], None]) -> None:
    """``facts`` of :func:`traffic_of` as lines of text."""
    show(
        f"adapters in a decode step on {facts['gpu']}, predicted, not measured: every sequence another adapter, plain "
        f"LoRA of rank {facts['adapter_rank']} against {facts['clusters']} clusters of rank {facts['rank']} with bases "
        "in 16 and in 8 bits"
    )
    for step in facts["steps"]:
        plain, ours, eight_bit = step["plain"], step["compressed"], step["compressed_8_bit"]
        show(
            f"{step['sequences']:4d} sequences: {plain['bytes'] / _MEGABYTE:9.1f} MB plain, "
            f"{ours['bytes'] / _MEGABYTE:8.1f} and {eight_bit['bytes'] / _MEGABYTE:8.1f} MB compressed; "
            f"+{plain['share_of_base']:4.0%}, +{ours['share_of_base']:4.0%} and +{eight_bit['share_of_base']:4.0%} of "
            "the time of the base model's products"
        )


def _modules(slices: Iterable[tuple[str, int, int]]) -> list[Any]:
    """The modules that vLLM makes of the slices, as shapes."""
    from vllm_jdlora.kernels.traffic import ModuleShape

    widths: dict[tuple[str, int], list[int]] = {}
    for name, d_out, d_in in slices:
        parent, _, leaf = name.rpartition(".")
        widths.setdefault((f"{parent}.{_PACKED.get(leaf, leaf)}", d_in), []).append(d_out)
    return [ModuleShape(d_in, tuple(outputs)) for (_, d_in), outputs in widths.items()]
