"""Bytes that a worker allocates on its device for adapters, from shapes alone: no vLLM, no engine.

What is counted are the buffers that vLLM's LoRA layers and this package allocate when the model is loaded: bases, slots
of plain adapters, and Σ. Scratch and the plan of a step are not: they grow with the tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.serving.options import buffer_rank

_PACKED = {
    part: (module, parts)
    for module, parts in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", ("gate_proj", "up_proj")),
    )
    for part in parts
}
"""What vLLM makes one module of, if the parts lie in one parent."""
_OF_ONE_SIZE = {"k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}
_SCALE, _WIDE = 4, 4  # bytes of the scale of a direction in 8 bits, and of a number in fp32


_KEYS = ("k_proj", "v_proj")
_OUTPUTS_SPLIT = ("qkv_proj", "q_proj", *_KEYS, "gate_up_proj", "gate_proj", "up_proj")
_INPUTS_SPLIT = ("o_proj", "down_proj")
"""Modules whose outputs, or inputs, the ranks of tensor parallelism divide among themselves."""


@dataclass(frozen=True)
class WrappedModule:
    """A linear layer with LoRA as vLLM makes it: one input, the outputs of its slices. Of one rank where there are
    several."""

    d_in: int
    widths: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """Of all slices' A and B for each rank."""
        return len(self.widths) * self.d_in + sum(self.widths)


def wrapped_modules(
    targets: Mapping[str, tuple[int, int]],
    model: Mapping[str, tuple[int, int]] | None = None,
    *,
    ranks: int = 1,
    key_heads: int = 1,
) -> tuple[list[WrappedModule], list[str]]:
    """The modules that vLLM wraps for these targets, with slices that no adapter changes but that buffers have.

    Args:
        targets: name → (d_out, d_in) of each slice that adapters change.
        model: the same of every linear layer of the model. Without it a slice beside the targets is taken to have
            the size of its twin (k of v, gate of up), and only layers with targets are counted.
        ranks: of tensor parallelism; the modules are those of one of them.
        key_heads: of the model's attention; looked at where there are several ranks.

    Returns:
        The modules, and names of slices whose size could not be told, which are left out.

    Raises:
        JDLoRAError: the model cannot be divided among so many ranks, or how a module is divided is not known here.
    """
    shapes = dict(model or {}) | dict(targets)
    suffixes = {name.rpartition(".")[2] for name in targets}
    modules: dict[str, WrappedModule] = {}
    unknown: list[str] = []
    for name in shapes:
        parent, _, leaf = name.rpartition(".")
        module, parts = _PACKED.get(leaf, (leaf, (leaf,)))
        key = f"{parent}.{module}"
        if key in modules or not suffixes & set(parts):
            continue
        found = [shapes.get(f"{parent}.{part}") or shapes.get(f"{parent}.{_OF_ONE_SIZE.get(part)}") for part in parts]
        unknown += [f"{parent}.{part}" for part, shape in zip(parts, found, strict=True) if shape is None]
        known = {part: shape for part, shape in zip(parts, found, strict=True) if shape is not None}
        d_in = next(iter(known.values()))[1]
        widths = tuple(_outputs_of_a_rank(part, d_out, ranks, key_heads) for part, (d_out, _) in known.items())
        modules[key] = WrappedModule(_inputs_of_a_rank(module, d_in, ranks), widths)
    return list(modules.values()), unknown


def _inputs_of_a_rank(module: str, d_in: int, ranks: int) -> int:
    return _share(module, d_in, ranks) if module in _INPUTS_SPLIT else d_in


def _outputs_of_a_rank(part: str, d_out: int, ranks: int, key_heads: int) -> int:
    if ranks == 1 or part in _INPUTS_SPLIT:
        return d_out
    if part not in _OUTPUTS_SPLIT:
        raise JDLoRAError(f"how {part} is divided among {ranks} ranks is not known: leave --tensor-parallel-size out")
    if part == "qkv_proj" and ranks > key_heads:
        raise JDLoRAError(f"{ranks} ranks share {key_heads} heads of keys in one layer {part}: this is not counted yet")
    if part not in _KEYS or ranks <= key_heads:
        return _share(part, d_out, ranks)
    _share("heads of keys", ranks, key_heads)  # several ranks have the same head
    return d_out // key_heads


def _share(what: str, size: int, ranks: int) -> int:
    if size % ranks:
        raise JDLoRAError(f"{what}: {size} cannot be divided by {ranks}, so vLLM will not start with as many ranks")
    return size // ranks


@dataclass(frozen=True)
class DeviceBytes:
    """What one worker allocates.

    Attributes:
        modules: what vLLM wraps, as one rank has it.
        device: ``cuda`` or ``cpu``, whose buffers differ.
        dtype: of the model, in which all is kept; on CPU a model in fp16 has fp32 instead.
        diagonal: JD-Diag's Σ.
        base_bits: 8 for bases as a quantised collection stores them (``--jd-base-bits``).
        max_loras: slots of plain adapters (``--max-loras``).
        max_lora_rank: least width of the buffers (``--max-lora-rank``).
        base_slots: clusters that there is room for (``--jd-base-slots``); ``None`` for all.
        scaling_slots: Σ that there is room for (``--jd-scaling-slots``); ``None`` for all.
    """

    modules: tuple[WrappedModule, ...]
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    diagonal: bool = False
    base_bits: int = 16
    max_loras: int = 1
    max_lora_rank: int = 16
    base_slots: int | None = None
    scaling_slots: int | None = None

    def __post_init__(self) -> None:
        if self.device == "cuda" and self.dtype == torch.float32:
            raise JDLoRAError("adapters on CUDA are fp16 or bf16, not fp32")

    def width(self, rank: int) -> int:
        """Rank of the buffers for bases of this rank."""
        return buffer_rank(max(rank, self.max_lora_rank))

    def bases(self, clusters: int, rank: int) -> int:
        """Buffers of so many clusters, or of the base slots that were asked for."""
        width = self.width(rank)
        clusters = self.base_slots or clusters
        if self.device == "cpu":
            return clusters * self._stream(width, self.base_bits == 8)
        if self.base_bits == 8:
            scales = 2 * _SCALE * sum(len(m.widths) for m in self.modules)
            return clusters * width * (sum(m.numbers for m in self.modules) + scales)
        return clusters * self._lora(width)

    def plain_slots(self, rank: int) -> int:
        """Buffers of plain adapters beside bases of this rank."""
        width = self.width(rank)
        if self.device == "cuda":
            return self.max_loras * self._lora(width)
        # One slot in fp32, through which vLLM writes all others.
        stage = _WIDE * width * sum(m.numbers for m in self.modules)
        return self.max_loras * self._stream(width) + stage

    def scaling(self, rank: int) -> int:
        """Σ of one adapter."""
        width = self.width(rank)
        stored = _on_cpu(self.dtype) if self.device == "cpu" else self.dtype
        return stored.itemsize * sum(len(m.widths) for m in self.modules) * (width if self.diagonal else width**2)

    def total(self, clusters: int, rank: int, adapters: int) -> int:
        """Everything, with the Σ of so many adapters, or of the slots that were asked for, and the identity that
        plain ones pass through."""
        resident = adapters if self.scaling_slots is None else self.scaling_slots
        return self.bases(clusters, rank) + self.plain_slots(rank) + (resident + 1) * self.scaling(rank)

    def stock_slot(self, rank: int) -> int:
        """A slot of vLLM's own multi-LoRA for adapters of this rank; the identity of one buffer for another."""
        return self.dtype.itemsize * buffer_rank(rank) * sum(m.numbers for m in self.modules)

    def _lora(self, width: int) -> int:
        return self.dtype.itemsize * width * sum(m.numbers for m in self.modules)

    def _stream(self, width: int, eight_bit: bool = False) -> int:
        return sum(_stream_bytes(m, width, self.dtype, eight_bit) for m in self.modules)


def _on_cpu(dtype: torch.dtype) -> torch.dtype:
    """In which the CPU kernel has what a model of this dtype has."""
    return torch.float32 if dtype == torch.float16 else dtype


@cache
def _stream_bytes(module: WrappedModule, rank: int, dtype: torch.dtype, eight_bit: bool) -> int:
    """One cluster of one module as the CPU kernel reads it."""
    from vllm_jdlora.kernels.cpu_grouped import stream_shapes
    from vllm_jdlora.kernels.cpu_layout import Form

    # int8 and fp8 lie in the same way.
    form = Form.here(_on_cpu(dtype), torch.int8 if eight_bit else None)
    v, u = stream_shapes(module.widths, module.d_in, rank, form)
    scales = 2 * _SCALE * v[0] * v[2] if eight_bit else 0
    return form.basis.itemsize * sum(torch.Size(shape).numel() for shape in (v, *u)) + scales
