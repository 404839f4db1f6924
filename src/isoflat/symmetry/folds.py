"""What is fixed before anything is balanced: deviations of batch normalisations, and gains that go into their readers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups import scaling
from isoflat.symmetry.relations import ZERO, Solution
from isoflat.symmetry.translation import deviation
from isoflat.symmetry.units import Exponents


def folds(found: Found, solution: Solution, state: State) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """Unknowns that are fixed before anything is minimised, and their values; gains' entries that go into readers."""
    fixed: list[int] = []
    targets: list[float] = []
    for running in found.ledger.runnings.values():
        moves = np.diff(solution.rows(running.deviation).indptr) > 0
        logs = deviation(running, state).log().cpu()
        fixed += running.deviation[torch.from_numpy(moves)].tolist()
        targets += (-logs[torch.from_numpy(moves)]).tolist()
    folded: dict[str, Tensor] = {}
    for name, mask in _foldable(found, solution, state).items():
        gain = state.tensors[name].cpu().reshape(-1)
        mask = mask & (gain != 0)
        if bool(mask.any()):
            folded[name] = mask.view(state.tensors[name].shape)
            fixed += found.ledger.fields[name].first.reshape(-1)[mask].tolist()
            targets += (-gain[mask].abs().log()).tolist()
    return fixed, targets, folded


def _foldable(found: Found, solution: Solution, state: State) -> dict[str, Tensor]:
    """Entries of normalisations' gains whose scale only they, their offset and columns of weights have.

    A gain is kept where it can be trained and some reader cannot: folding would take the freedom away.
    """
    group = scaling(found.ledger, solution)
    d = solution.dimension
    as_row, barred = np.zeros(d, dtype=int), np.zeros(d, dtype=bool)
    frozen_reader = np.zeros(d, dtype=bool)
    for entry in group.tensors:
        np.add.at(as_row, entry.first.indices, 1)
        if entry.sign == 1:
            barred[entry.second.indices] = True
        elif entry.name not in state.parameters:
            frozen_reader[entry.second.indices] = True
    for _, rows in (*group.norms, *group.runnings):
        barred[rows.indices] = True
    barred |= bent(found.ledger.bent, solution)
    by_name = {entry.name: entry for entry in group.tensors}
    result: dict[str, Tensor] = {}
    for norm in found.ledger.norms:
        entry = by_name.get(norm.gain) if norm.gain is not None else None
        if entry is None or entry.first.shape[0] == 1:
            continue
        single = np.diff(entry.first.indptr) == 1
        column = np.zeros(len(single), dtype=int)
        column[single] = entry.first.indices[entry.first.indptr[:-1][single]]
        rate = np.zeros(len(single))
        rate[single] = entry.first.data[entry.first.indptr[:-1][single]]
        plain = rate == 1
        offset = _offset_rows(found, entry, column, group.tensors)
        fine = plain & (as_row[column] == 1 + offset) & ~barred[column]
        if entry.name in state.parameters:
            fine &= ~frozen_reader[column]
        result[entry.name] = torch.from_numpy(fine)
    return result


def _offset_rows(
    found: Found, gain: Exponents, column: NDArray[np.int64], tensors: Sequence[Exponents]
) -> NDArray[np.int64]:
    """For each entry of a gain, how many offsets of normalisations have exactly its scale."""
    norms = {name for name, entry in found.ledger.additives.items() if entry.norm}
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
