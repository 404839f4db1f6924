"""Scalings of units that a user claims, as constraints beside those that tracing finds."""

from __future__ import annotations

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.groups.declared import UnitScale
from isoflat.symmetry.motions import Field
from isoflat.symmetry.relations import ZERO, is_all


def declare(symmetry: UnitScale, constraints: Constraints, state: State) -> None:
    """Add the unknowns to what tracing wrote down.

    Raises:
        UsageError: a tensor does not have these units.
    """
    symmetry.check(state)
    units = constraints.scales.fresh(symmetry.units)
    for name in symmetry.rows:
        entry = _seen(constraints, name, state.tensors[name])
        first = constraints.scales.combine((1, entry.first.expand(1, symmetry.units)), (1, units[None]))
        constraints.fields[name] = Field(name, entry.view, first, entry.second, entry.sign)
    for name in symmetry.columns:
        entry = _seen(constraints, name, state.tensors[name])
        second = constraints.scales.combine((1, entry.second.expand(1, symmetry.units)), (-entry.sign, units[None]))
        constraints.fields[name] = Field(name, entry.view, entry.first, second, entry.sign)


def _seen(constraints: Constraints, name: str, tensor: Tensor) -> Field:
    """Field of a tensor so far, seen by rows and columns; one that was pinned entry by entry can be seen in any way."""
    columns = tensor.shape[1] if tensor.ndim > 1 else 1
    view = (1, tensor.shape[0], columns, tensor[0, 0].numel() if tensor.ndim > 2 else 1)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    entry = constraints.fields.get(name)
    if entry is None or (entry.view != view and is_all(entry.first, ZERO) and is_all(entry.second, ZERO)):
        return Field(name, view, zero, zero)
    if entry.view != view:
        raise UsageError(f"UnitScale: '{name}' scales in a way that rows and columns cannot be told in; leave it out")
    return entry
