"""The factors of a list of adapters slice by slice, and how many numbers a method stores in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from vllm_jdlora.adapter import Adapter
from vllm_jdlora.errors import JDLoRAError
from vllm_jdlora.jd.problem import Factors


@dataclass(frozen=True)
class SliceSize:
    """One slice: its shape and the ranks ρ of the adapters that have something in it."""

    d_out: int
    d_in: int
    ranks: tuple[int, ...]

    @property
    def sides(self) -> int:
        """Numbers of one direction on both sides."""
        return self.d_out + self.d_in

    @property
    def narrow(self) -> int:
        """The largest rank that a ΔW can have."""
        return min(self.d_out, self.d_in)


class AdapterSlices(Sequence[list[Factors | None]]):
    """`self[m][i]`: adapter i in slice m, read from disk at each access. Slices are sorted by name."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Raises JDLoRAError if adapters disagree on a slice's shape or there are none."""
        if not adapters:
            raise JDLoRAError("there is nothing to compare: give at least one adapter")
        self._adapters = adapters
        self.names = sorted({name for adapter in adapters for name in adapter.slices})
        self.sizes: list[SliceSize] = []
        for name in self.names:
            parts = [adapter.slices[name] for adapter in adapters if name in adapter.slices]
            shapes = {(part.shape.d_out, part.shape.d_in) for part in parts}
            if len(shapes) > 1:
                raise JDLoRAError(f"slice {name}: shapes {sorted(shapes)}; compare adapters of one base model only")
            ((d_out, d_in),) = shapes
            self.sizes.append(SliceSize(d_out, d_in, tuple(part.rank for part in parts)))

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> list[Factors | None]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[list[Factors | None]]: ...
    def __getitem__(self, index: int | slice) -> list[Factors | None] | Sequence[list[Factors | None]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pairs = [adapter.factors(self.names[index]) for adapter in self._adapters]
        return [None if pair is None else Factors(*pair) for pair in pairs]
