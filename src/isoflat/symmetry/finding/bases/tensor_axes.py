"""Axes of stored tensors that carry units that may be mixed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from isoflat.symmetry.finding.bases.partition import CellBlock, Partition
from isoflat.symmetry.finding.values import Slice, StoredTensor


@final
@dataclass(frozen=True)
class TensorAxis:
    """One axis of a stored tensor.

    Attributes:
        units: unit of each index along the axis, shape `(n,)`.
        dual: whether the tensor reads the units (its slices are mixed by `−Xᵀ`), or writes them.
        role: axes of one role make up one vector of slices together, such as the rows of two weights side by side.
    """

    units: Tensor
    dual: bool
    role: Hashable


@final
@dataclass(frozen=True)
class Region:
    """A stored tensor, or consecutive slices of it.

    Attributes:
        name: name of the tensor.
        axis: along which it is cut; None for the whole of it.
        start: index of the first slice.
        size: number of slices.
    """

    name: str
    axis: int | None = None
    start: int = 0
    size: int = 0

    def meets(self, other: Region) -> bool:
        """Test whether two different regions share entries, or may."""
        if self.name != other.name or self == other:
            return False
        apart = self.start + self.size <= other.start or other.start + other.size <= self.start
        return self.axis is None or self.axis != other.axis or not apart


@final
@dataclass
class TensorAxes:
    """Axes of stored tensors that carry units, gathered while the operations are gone through.

    Attributes:
        foldable: vectors that multiply what a normalisation gives, and can be folded into what reads them.
        normalised: nodes that hold what a normalisation written by hand gives.
        partition: units of all activations, in cells that may be mixed.
        by_region: axes that carry units, by region and number of the axis.
        gains: name of the gain that units have passed, by the first and last of them.
        squares: nodes whose values are squares, with the units that were squared.
    """

    foldable: frozenset[str]
    normalised: frozenset[object] = frozenset()
    partition: Partition = field(default_factory=Partition)
    by_region: dict[tuple[Region, int], TensorAxis] = field(default_factory=dict)
    gains: list[tuple[int, int, str]] = field(default_factory=list)
    squares: dict[object, Tensor] = field(default_factory=dict)
    _uses: dict[Region, list[frozenset[int]]] = field(default_factory=dict)

    def use(self, tensor: StoredTensor | Slice, tensor_axes: Mapping[int, TensorAxis] | None = None) -> None:
        """Write down a use of a tensor: the axes that carry units there, by number; where others see it, both must hold."""
        region = Region(tensor.name)
        if isinstance(tensor, Slice):
            region = Region(tensor.name, tensor.axis, tensor.start, tensor.shape[tensor.axis])
        self._uses.setdefault(region, []).append(frozenset(tensor_axes or ()))
        for axis, tensor_axis in (tensor_axes or {}).items():
            old = self.by_region.setdefault((region, axis), tensor_axis)
            if old is not tensor_axis:
                self.partition.tie(old.units, tensor_axis.units, dual=old.dual != tensor_axis.dual)

    def through(self, gain: StoredTensor, units: Tensor) -> Tensor:
        """The units after a gain, which whatever reads them takes up."""
        made = self.partition.fresh(len(units), (gain.name, len(self.gains)))
        self.partition.tie(made, units)
        self.gains.append((int(made[0]), int(made[-1]), gain.name))
        return made

    def entries(self, tensor: StoredTensor | Slice) -> Tensor:
        """Units of a tensor that flows itself, such as a table of positions: along its last axis, shape of the tensor."""
        if not tensor.shape:
            self.use(tensor)
            return torch.zeros((), dtype=torch.int64)
        last = len(tensor.shape) - 1
        units = self.partition.fresh(tensor.shape[last], ("table", tensor.name, sum(map(len, self._uses.values()))))
        self.use(tensor, {last: TensorAxis(units, False, ("table", tensor.name))})
        return units.expand(tensor.shape)

    def settle(self) -> tuple[CellBlock, ...]:
        """The blocks, once the whole network has been gone through: an axis that some use does not mix is held."""
        for (region, axis), tensor_axis in self.by_region.items():
            if not all(axis in use for use in self._uses[region]) or any(map(region.meets, self._uses)):
                self.partition.hold(tensor_axis.units)
        return self.partition.solve()
