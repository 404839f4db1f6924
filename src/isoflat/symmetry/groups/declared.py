"""Symmetries that a user claims: proved on the network, then part of the group like those that were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.symmetry.groups.base import Symmetry


@final
@dataclass(frozen=True)
class UnitScale(Symmetry):
    """Scaling of each of n units by a factor of its own: rows of some tensors with it, columns of others against it.

    For units behind an operation that tracing does not know, such as a custom activation that is positively homogeneous.

    Attributes:
        rows: tensors whose first axis holds the units, biases included: multiplied by the unit's factor.
        columns: tensors whose second axis holds the units: divided by it.
        units: number of units.

    >>> state = State({"a": torch.ones(2, 3), "b": torch.ones(4, 2)})
    >>> moved = UnitScale(("a",), ("b",), 2).act(state, torch.tensor([0.0, 1.0], dtype=torch.float64))
    >>> [round(x, 3) for x in moved.parameters["b"][0].tolist()]
    [1.0, 0.368]
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    units: int

    @property
    def label(self) -> str:
        """Name and tensors in a fixed spelling: another one would draw other random elements."""
        return f"UnitScale(rows={self.rows!r}, columns={self.columns!r}, units={self.units!r})"

    @property
    def touches(self) -> frozenset[str]:
        """Tensors that hold the units."""
        return frozenset((*self.rows, *self.columns))

    @property
    def dimension(self) -> int:
        """Number of units."""
        return self.units

    def act(self, state: State, element: Tensor) -> State:
        """Multiply and divide; an element is the vector of log-factors."""
        self.check(state)
        return state.replace(
            {
                name: state.tensors[name] * log.exp().to(state.tensors[name])
                for name, log in self._logs(state, element).items()
            }
        )

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """`δT = T · (rates of its logarithms)`."""
        self.check(state)
        return {
            name: state.tensors[name].detach().double() * log.to(state.device)
            for name, log in self._logs(state, rates).items()
        }

    def check(self, state: State) -> None:
        """Refusal of a state in which a tensor does not have these units.

        Raises:
            UsageError: a tensor does not have these units.
        """
        for names, axis in ((self.rows, 0), (self.columns, 1)):
            for name in names:
                tensor = state.tensors.get(name)
                if tensor is None or tensor.ndim <= axis or tensor.shape[axis] != self.units:
                    shape = "no such tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
                    raise UsageError(f"UnitScale: expected {self.units} units on axis {axis} of '{name}', got {shape}")

    def _logs(self, state: State, element: Tensor) -> dict[str, Tensor]:
        logs: dict[str, Tensor] = {}
        for names, axis, sign in ((self.rows, 0, 1), (self.columns, 1, -1)):
            for name in names:
                shape = [1] * state.tensors[name].ndim
                shape[axis] = -1
                logs[name] = logs.get(name, torch.zeros((), dtype=torch.float64)) + sign * element.double().view(shape)
        return logs
