"""Adapters as the mathematics wants them: the slices that any of them has, and one slice's factors at a time."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_jdlora.adapter import WEIGHTS_FILE, Adapter, SliceShape
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.budget import Sizes
from vllm_jdlora.jd.problem import Factors

_PLAIN_WIDTH = 2
"""Bytes of a number of a plain adapter: bf16 or fp16 on the device."""
_SCALE_WIDTH = 4
"""Bytes of the scale of a quantised direction."""


class AdapterSource:
    """A `FactorSource` over PEFT folders: factors are read from disk when asked for."""

    def __init__(self, adapters: Sequence[Adapter], slices: Sequence[SliceShape]):
        self._adapters = adapters
        self.slice_names = [s.name for s in slices]

    @property
    def n(self) -> int:
        return len(self._adapters)

    def factors(self, slice_index: int) -> list[Factors | None]:
        name = self.slice_names[slice_index]
        pairs = [adapter.factors(name) for adapter in self._adapters]
        return [None if pair is None else Factors(*pair) for pair in pairs]


def common_slices(adapters: Sequence[Adapter]) -> list[SliceShape]:
    """Every slice that any adapter has, in the model's order.

    Raises:
        JDLoRAError: two adapters disagree on a shape.
    """
    shapes: dict[str, tuple[SliceShape, str]] = {}
    for adapter in adapters:
        for name, part in adapter.slices.items():
            known, owner = shapes.setdefault(name, (part.shape, adapter.name))
            if known != part.shape:
                raise JDLoRAError(
                    f"{adapter.path / WEIGHTS_FILE}: {name} is {part.shape.d_out} x {part.shape.d_in}, in {owner} it "
                    f"is {known.d_out} x {known.d_in}: they belong to different base models, compress them apart"
                )
    return [shapes[name][0] for name in sorted(shapes, key=_model_order)]


def sizes_of(
    adapters: Sequence[Adapter],
    slices: Sequence[SliceShape],
    *,
    dtype_width: int,
    quantize: str = "none",
    diagonal: bool = False,
    always_plain: int = 0,
) -> Sizes:
    """What these adapters take as a collection, for the choice of rank and clusters.

    dtype_width: bytes of a number of Σ, and of the bases unless `quantize` makes that one. always_plain: bytes of
    adapters beside these that cannot be compressed.
    """
    return Sizes(
        slices=tuple((part.d_out, part.d_in) for part in slices),
        plain=tuple(_PLAIN_WIDTH * a.parameters for a in adapters),
        basis_width=dtype_width if quantize == "none" else 1,
        sigma_width=dtype_width,
        scale_width=0 if quantize == "none" else _SCALE_WIDTH,
        diagonal=diagonal,
        always_plain=always_plain,
    )


def _model_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 10 after layer 9."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
