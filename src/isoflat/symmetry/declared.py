"""Symmetries that a user claims: proved on the network, then part of the group like those that were found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.symmetry.base import Symmetry
from isoflat.symmetry.ledger import Field, Ledger
from isoflat.symmetry.relations import ZERO, is_all


@final
@dataclass(frozen=True)
class UnitScale(Symmetry):
    """Each of n units times a factor of its own: rows of some tensors with it, columns of others against it.

    For units behind an operation that tracing does not know, such as a custom activation that is positively homogeneous.

    Attributes:
        rows: tensors whose first axis holds the units, biases included: multiplied by the unit's factor.
        columns: tensors whose second axis holds the units: divided by it.
        units: how many.

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
        """All of them."""
        return frozenset((*self.rows, *self.columns))

    @property
    def dimension(self) -> int:
        """One per unit."""
        return self.units

    def sample(self, stream: torch.Generator, spread: float = 1.0) -> Tensor:
        """Normal log-factors."""
        return torch.randn(self.units, generator=stream, dtype=torch.float64) * spread

    def act(self, state: State, element: Tensor) -> State:
        """Multiply and divide; an element is the vector of log-factors."""
        self._check(state)
        return state.replace(
            {
                name: state.tensors[name] * log.exp().to(state.tensors[name])
                for name, log in self._logs(state, element).items()
            }
        )

    def velocity(self, state: State, rates: Tensor) -> dict[str, Tensor]:
        """`δT = T · (rates of its logarithms)`."""
        self._check(state)
        return {
            name: state.tensors[name].detach().double() * log.to(state.device)
            for name, log in self._logs(state, rates).items()
        }

    def declare(self, ledger: Ledger, state: State) -> None:
        """Add the unknowns to what tracing wrote down.

        Raises:
            UsageError: a tensor does not have these units.
        """
        self._check(state)
        units = ledger.scales.fresh(self.units)
        for name in self.rows:
            entry = _seen(ledger, name, state.tensors[name])
            first = ledger.scales.combine((1, entry.first.expand(1, self.units)), (1, units[None]))
            ledger.fields[name] = Field(name, entry.view, first, entry.second, entry.sign)
        for name in self.columns:
            entry = _seen(ledger, name, state.tensors[name])
            second = ledger.scales.combine((1, entry.second.expand(1, self.units)), (-entry.sign, units[None]))
            ledger.fields[name] = Field(name, entry.view, entry.first, second, entry.sign)

    def _check(self, state: State) -> None:
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


def _seen(ledger: Ledger, name: str, tensor: Tensor) -> Field:
    """How a tensor scales so far, seen by rows and columns; one that was pinned entry by entry can be seen in any way."""
    columns = tensor.shape[1] if tensor.ndim > 1 else 1
    view = (1, tensor.shape[0], columns, tensor[0, 0].numel() if tensor.ndim > 2 else 1)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    entry = ledger.fields.get(name)
    if entry is None or (entry.view != view and is_all(entry.first, ZERO) and is_all(entry.second, ZERO)):
        return Field(name, view, zero, zero)
    if entry.view != view:
        raise UsageError(f"UnitScale: '{name}' scales in a way that rows and columns cannot be told in; leave it out")
    return entry
