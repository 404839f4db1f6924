"""Gains after normalisations that can be folded into what reads them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.groups.units import Exponents, UnitScaling
from isoflat.symmetry.relations import ZERO, Solution


def foldable(constraints: Constraints, solution: Solution, group: UnitScaling) -> dict[str, NDArray[np.bool_]]:
    """Entries of gains whose scale only they, their offset and columns of weights have."""
    return {name: fine for name, (fine, _) in _columns(constraints, solution, group, frozenset()).items()}


def kept(constraints: Constraints, solution: Solution, group: UnitScaling, state: State) -> frozenset[str]:
    """Gains that are not folded at a state, or not wholly: what is mixed behind them is not covered there."""
    masks = foldable_at(constraints, solution, group, state)
    whole = {name for name, mask in masks.items() if bool((mask & (state.tensors[name].cpu().reshape(-1) != 0)).all())}
    return frozenset(constraints.gains - whole)


def foldable_at(constraints: Constraints, solution: Solution, group: UnitScaling, state: State) -> dict[str, Tensor]:
    """Entries of gains that are folded at a state.

    A gain is kept where it can be trained and some reader cannot: folding would take the freedom away.
    """
    result: dict[str, Tensor] = {}
    for name, (fine, frozen) in _columns(constraints, solution, group, state.parameters.keys()).items():
        result[name] = torch.from_numpy(fine & ~frozen if name in state.parameters else fine)
    return result


def _columns(
    constraints: Constraints, solution: Solution, group: UnitScaling, trainable: Collection[str]
) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Masks for each gain: entries that may be folded, and those of them that something frozen reads."""
    d = solution.dimension
    as_row, barred = np.zeros(d, dtype=int), np.zeros(d, dtype=bool)
    frozen_reader = np.zeros(d, dtype=bool)
    for entry in group.tensors:
        # Against a weight's columns stand the units that it reads; a weight that holds its inputs first has them as rows.
        own, read = (entry.second, entry.first) if _inputs_first(entry) else (entry.first, entry.second)
        np.add.at(as_row, own.indices, 1)
        if entry.sign == 1 and not _inputs_first(entry):
            barred[read.indices] = True
        elif entry.name not in trainable:
            frozen_reader[read.indices] = True
    for _, rows in (*group.norms, *group.runnings):
        barred[rows.indices] = True
    barred |= bent(constraints.bent, solution)
    by_name = {entry.name: entry for entry in group.tensors}
    result: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] = {}
    for name in sorted(constraints.gains):
        entry = by_name.get(name)
        if entry is None or entry.first.shape[0] == 1:
            continue
        single = np.diff(entry.first.indptr) == 1
        column = np.zeros(len(single), dtype=int)
        column[single] = entry.first.indices[entry.first.indptr[:-1][single]]
        rate = np.zeros(len(single))
        rate[single] = entry.first.data[entry.first.indptr[:-1][single]]
        offset = _offset_rows(constraints, entry, column, group.tensors)
        fine = (rate == 1) & (as_row[column] == 1 + offset) & ~barred[column]
        result[name] = fine, frozen_reader[column]
    return result


def _inputs_first(entry: Exponents) -> bool:
    """Test whether a tensor's first units are those that it reads."""
    return entry.sign == 1 and entry.first.nnz > 0 and bool((entry.first.data < 0).all())


def _offset_rows(
    constraints: Constraints, gain: Exponents, column: NDArray[np.int64], tensors: Sequence[Exponents]
) -> NDArray[np.int64]:
    """Counts for each entry of a gain: how many offsets of normalisations have exactly its scale."""
    norms = {name for name, entry in constraints.additives.items() if entry.norm}
    count = np.zeros(len(column), dtype=int)
    for entry in tensors:
        if entry.name in norms and entry.first.shape == gain.first.shape and (entry.first != gain.first).nnz == 0:
            count += 1
    return count


def bent(ids: set[int], solution: Solution) -> NDArray[np.bool_]:
    """Coordinates of units that pass a kink or a nonlinearity."""
    mask = np.zeros(solution.dimension, dtype=bool)
    chosen = torch.tensor(sorted(x for x in ids if x != ZERO), dtype=torch.int64)
    mask[np.unique(solution.rows(chosen).indices)] = True
    return mask
