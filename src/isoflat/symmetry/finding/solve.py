"""From what tracing wrote down to groups: the relations solved, and what moves no tensor left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isoflat.symmetry.finding.constraints import Ledger
from isoflat.symmetry.groups.translation import Centre, Offset, Translation
from isoflat.symmetry.groups.units import UnitScaling, exponents
from isoflat.symmetry.relations import Form, Solution


def scaling(ledger: Ledger, solution: Solution) -> UnitScaling:
    """The group of scalings for a solution of the relations."""
    tensors = tuple(exponents(entry, solution) for entry in ledger.fields.values())
    runnings = tuple((running, solution.rows(running.deviation)) for running in ledger.runnings.values())
    norms = tuple((norm, solution.rows(torch.tensor(norm.factors, dtype=torch.int64))) for norm in ledger.norms)
    return UnitScaling(tuple(e for e in tensors if not e.still()), runnings, norms, solution.dimension)


def effective(ledger: Ledger, solution: Solution) -> Solution:
    """Without the coordinates that move no stored tensor."""
    matrices = [solution.rows(part) for entry in ledger.fields.values() for part in (entry.first, entry.second)]
    matrices += [solution.rows(running.deviation) for running in ledger.runnings.values()]
    used = np.zeros(solution.dimension, dtype=bool)
    for matrix in matrices:
        used[np.unique(matrix.indices)] = True
    return solution.restricted(used)


def translation(ledger: Ledger, zero: tuple[Form, ...] = ()) -> Translation:
    """The group of shifts."""
    solution = ledger.shifts.solve(zero)
    ids: list[Tensor] = []
    for entry in ledger.additives.values():
        ids.append(entry.shift)
        if entry.absorbed is not None:
            ids.append(entry.absorbed.shift)
    for running in ledger.runnings.values():
        ids += [running.entering, running.moved, *([running.absorbed.shift] if running.absorbed is not None else [])]
    used = np.zeros(solution.dimension, dtype=bool)
    for part in ids:
        used[np.unique(solution.rows(part).indices)] = True
    solution = solution.restricted(used)
    offsets = tuple(
        Offset(
            entry, solution.rows(entry.shift), None if entry.absorbed is None else solution.rows(entry.absorbed.shift)
        )
        for entry in ledger.additives.values()
    )
    centres = tuple(
        Centre(
            running,
            solution.rows(running.entering),
            solution.rows(running.moved),
            None if running.absorbed is None else solution.rows(running.absorbed.shift),
        )
        for running in ledger.runnings.values()
    )
    return Translation(offsets, centres, solution.dimension)
