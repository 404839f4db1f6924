"""Which axes of stored tensors carry units that may be mixed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from isoflat.symmetry.finding.bases.partition import Block, Cells
from isoflat.symmetry.finding.values import Slice, Stored


@final
@dataclass(frozen=True)
class Leg:
    """One axis of a stored tensor.

    Attributes:
        units: unit of each index along the axis, shape `(n,)`.
        dual: whether the tensor reads the units (its slices are mixed by `−Xᵀ`), or writes them.
        role: legs of one role make up one vector of slices together, such as the rows of two weights side by side.
    """

    units: Tensor
    dual: bool
    role: Hashable


@final
@dataclass(frozen=True)
class Region:
    """A stored tensor, or consecutive slices of it.

    Attributes:
        name: of the tensor.
        axis: along which it is cut; None for the whole of it.
        start: of the first slice.
        size: number of slices.
    """

    name: str
    axis: int | None = None
    start: int = 0
    size: int = 0

    def meets(self, other: Region) -> bool:
        """Whether two different regions share entries, or may."""
        if self.name != other.name or self == other:
            return False
        apart = self.start + self.size <= other.start or other.start + other.size <= self.start
        return self.axis is None or self.axis != other.axis or not apart


@final
@dataclass
class Legs:
    """What a walk through the network writes down about bases.

    Attributes:
        foldable: vectors that multiply what a normalisation gives, and can be folded into what reads them.
        normalised: nodes that hold what a normalisation written by hand gives.
        cells: the units.
        legs: by region and axis.
        gains: name of the gain that units have passed, by the first and last of them.
        squares: nodes whose values are squares, with the units that were squared.
    """

    foldable: frozenset[str]
    normalised: frozenset[object] = frozenset()
    cells: Cells = field(default_factory=Cells)
    legs: dict[tuple[Region, int], Leg] = field(default_factory=dict)
    gains: list[tuple[int, int, str]] = field(default_factory=list)
    squares: dict[object, Tensor] = field(default_factory=dict)
    _uses: dict[Region, list[frozenset[int]]] = field(default_factory=dict)

    def use(self, tensor: Stored | Slice, legs: Mapping[int, Leg] | None = None) -> None:
        """Write down a use of a tensor: the legs it has there, by axis; where others see it, both must hold."""
        region = Region(tensor.name)
        if isinstance(tensor, Slice):
            region = Region(tensor.name, tensor.axis, tensor.start, tensor.shape[tensor.axis])
        self._uses.setdefault(region, []).append(frozenset(legs or ()))
        for axis, leg in (legs or {}).items():
            old = self.legs.setdefault((region, axis), leg)
            if old is not leg:
                self.cells.tie(old.units, leg.units, dual=old.dual != leg.dual)

    def through(self, gain: Stored, units: Tensor) -> Tensor:
        """The units after a gain, which whatever reads them takes up."""
        made = self.cells.fresh(len(units), (gain.name, len(self.gains)))
        self.cells.tie(made, units)
        self.gains.append((int(made[0]), int(made[-1]), gain.name))
        return made

    def entries(self, tensor: Stored | Slice) -> Tensor:
        """Units of a tensor that flows itself, such as a table of positions: along its last axis, shape of the tensor."""
        if not tensor.shape:
            self.use(tensor)
            return torch.zeros((), dtype=torch.int64)
        last = len(tensor.shape) - 1
        units = self.cells.fresh(tensor.shape[last], ("table", tensor.name, sum(map(len, self._uses.values()))))
        self.use(tensor, {last: Leg(units, False, ("table", tensor.name))})
        return units.expand(tensor.shape)

    def settle(self) -> tuple[Block, ...]:
        """The blocks, once the whole network is walked through: an axis that some use does not mix is held."""
        for (region, axis), leg in self.legs.items():
            if not all(axis in use for use in self._uses[region]) or any(map(region.meets, self._uses)):
                self.cells.hold(leg.units)
        return self.cells.solve()
