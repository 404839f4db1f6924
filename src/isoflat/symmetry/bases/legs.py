"""Which axes of stored tensors carry units that may be mixed."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from isoflat.symmetry.bases.cells import Block, Cells
from isoflat.symmetry.values import Stored


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
@dataclass
class Legs:
    """What a walk through the network writes down about bases.

    Attributes:
        cells: the units.
        legs: by tensor and axis.
        foldable: vectors that multiply what a normalisation gives, and can be folded into what reads them.
        gains: name of the gain that units have passed, by the first and last of them.
        squares: nodes whose values are squares, with the units that were squared.
        normalised: nodes that hold what a normalisation written by hand gives.
    """

    foldable: frozenset[str]
    normalised: frozenset[object] = frozenset()
    cells: Cells = field(default_factory=Cells)
    legs: dict[tuple[str, int], Leg] = field(default_factory=dict)
    gains: list[tuple[int, int, str]] = field(default_factory=list)
    squares: dict[object, Tensor] = field(default_factory=dict)
    _uses: dict[str, list[frozenset[int]]] = field(default_factory=dict)

    def use(self, tensor: Stored, **axes: Leg) -> None:
        """Write down a use of a tensor: the legs that it has there (`axis0=…`); where others see it, both must hold."""
        self._uses.setdefault(tensor.name, []).append(frozenset(int(axis[4:]) for axis in axes))
        for axis, leg in axes.items():
            old = self.legs.setdefault((tensor.name, int(axis[4:])), leg)
            if old is not leg:
                self.cells.tie(old.units, leg.units, dual=old.dual != leg.dual)

    def through(self, gain: Stored, units: Tensor) -> Tensor:
        """The units after a gain, which whatever reads them takes up."""
        made = self.cells.fresh(len(units), (gain.name, len(self.gains)))
        self.cells.tie(made, units)
        self.gains.append((int(made[0]), int(made[-1]), gain.name))
        return made

    def entries(self, tensor: Stored) -> Tensor:
        """Units of a tensor that flows itself, such as a table of positions: along its last axis, shape of the tensor."""
        if not tensor.shape:
            self.use(tensor)
            return torch.zeros((), dtype=torch.int64)
        last = len(tensor.shape) - 1
        units = self.cells.fresh(tensor.shape[last], ("table", tensor.name, len(self._uses.get(tensor.name, ()))))
        self.use(tensor, **{f"axis{last}": Leg(units, False, ("table", tensor.name))})
        return units.expand(tensor.shape)

    def settle(self) -> tuple[Block, ...]:
        """The blocks, once the whole network is walked through: an axis that some use does not mix is held."""
        for (name, axis), leg in self.legs.items():
            if not all(axis in use for use in self._uses[name]):
                self.cells.hold(leg.units)
        return self.cells.solve()
