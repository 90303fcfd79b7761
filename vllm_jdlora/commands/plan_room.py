"""Rows of a plan: what one rank and number of clusters takes on disk, on the host and on the device, and what fits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.budget import Sizes
from vllm_jdlora.serving.device_bytes import DeviceBytes, wrapped_modules

_ANY = 1 << 40
"""More adapters than anybody has."""


@dataclass(frozen=True)
class Room:
    """What there is to place, and where.

    Attributes:
        sizes: of the collection as it is stored.
        device: what a worker allocates for it.
        adapter_rank: of the uncompressed adapters.
        memory: of the device for adapters, in bytes.
        expected: how many adapters there will be; with more of them, as many in a cluster and as large a share plain
            as now.
        plain: positions of the adapters that are kept plain: they have no Σ, and `device` is wide enough for them.
    """

    sizes: Sizes
    device: DeviceBytes
    adapter_rank: int
    memory: int | None = None
    expected: int | None = None
    plain: tuple[int, ...] = ()

    @property
    def plain_slot(self) -> int:
        """Of vLLM's own multi-LoRA."""
        return self.device.stock_slot(self.adapter_rank)

    def row(self, clusters: int, rank: int) -> dict[str, Any]:
        """All bytes of one rank and number of clusters."""
        sizes, device, compressed = self.sizes, self.device, self._compressed(self.sizes.n)
        row: dict[str, Any] = {
            "rank": rank,
            "clusters": clusters,
            "bytes": {
                "disk": {
                    "bases": sizes.bases(clusters, rank),
                    "each_adapter": sizes.scaling(rank),
                    "total": sizes.total(clusters, rank, self.plain),
                },
                "host": compressed * sizes.scaling(rank),
                "device": {
                    "bases": device.bases(clusters, rank),
                    "each_adapter": device.scaling(rank),
                    "plain_slots": device.plain_slots(rank),
                    "total": device.total(clusters, rank, compressed),
                },
            },
        }
        if self.expected is not None:
            grown = self._grown(clusters, self.expected)
            scalings = self._compressed(self.expected) * sizes.scaling(rank)
            plain = sum(sizes.plain[i] for i in self.plain) * self.expected // sizes.n
            row["expected"] = {
                "clusters": grown,
                "disk": sizes.bases(grown, rank) + scalings + plain,
                "host": scalings,
                "device": self.device_for(self.expected, clusters, rank),
                "plain_slots": self.expected * self.plain_slot,
            }
        if self.memory is not None:
            row["fit"] = {
                "at_this_error": self._most(lambda adapters: self.device_for(adapters, clusters, rank)),
                "on_these_bases": self._most(lambda adapters: device.total(clusters, rank, self._compressed(adapters))),
                "plain_slots": self.memory // self.plain_slot,
            }
        return row

    def device_for(self, adapters: int, clusters: int, rank: int) -> int:
        """Device bytes when there are so many adapters and as many in a cluster as now."""
        return self.device.total(self._grown(clusters, adapters), rank, self._compressed(adapters))

    def _compressed(self, adapters: int) -> int:
        return adapters - len(self.plain) * adapters // self.sizes.n

    def _grown(self, clusters: int, adapters: int) -> int:
        return math.ceil(clusters * adapters / self.sizes.n)

    def _most(self, bytes_of: Callable[[int], int]) -> int | None:
        """The most adapters that fit; ``None`` where they take no more of the device however many there are."""
        assert self.memory is not None
        low, high = 0, _ANY
        if bytes_of(high) <= self.memory:
            return None
        while low < high - 1:  # low fits (or is nothing), high does not
            middle = (low + high) // 2
            low, high = (middle, high) if bytes_of(middle) <= self.memory else (low, middle)
        return low


def room_of(
    args: argparse.Namespace,
    sizes: Sizes,
    shapes: Mapping[str, tuple[int, int]],
    adapter_rank: int,
    *,
    of_plain: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[Room, dict[str, Any]]:
    """Where things go, and what every plan says of it.

    shapes: (d_out, d_in) of the slices that compressed adapters change, by name. of_plain: of those that plain ones do.
    """
    from vllm_jdlora.commands.plan_model import key_heads, linear_layers

    ranks = args.tensor_parallel_size
    if ranks > 1 and not args.base_model:
        raise JDLoRAError("--tensor-parallel-size needs --base-model, whose heads are divided")
    modules, unknown = wrapped_modules(
        {**(of_plain or {}), **shapes},
        linear_layers(args.base_model) if args.base_model else None,
        ranks=ranks,
        key_heads=key_heads(args.base_model) if ranks > 1 else 1,
    )
    # Where a collection is wider than a GPU's adapters, they are served in 16 bits.
    wide = args.dtype == "fp32" and args.device == "cpu"
    device = DeviceBytes(
        tuple(modules),
        device=args.device,
        dtype=torch.float32 if wide else torch.bfloat16,
        diagonal=sizes.diagonal,
        base_bits=args.jd_base_bits or (8 if args.device == "cpu" and sizes.basis_width == 1 else 16),
        max_loras=args.max_loras,
        max_lora_rank=args.max_lora_rank,
        base_slots=args.jd_base_slots,
        scaling_slots=args.jd_scaling_slots,
    )
    room = Room(sizes, device, adapter_rank, args.device_memory, args.adapters_expected)
    return room, {
        "adapter_rank": adapter_rank,
        "slices": len(shapes),
        "wrapped_modules": len(modules),
        "unknown_slices": unknown,
        "device": args.device,
        "base_slots": args.jd_base_slots,
        "scaling_slots": args.jd_scaling_slots,
        "tensor_parallel_size": ranks,
        "device_memory": args.device_memory,
        "adapters_expected": args.adapters_expected,
    }
