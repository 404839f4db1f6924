"""Groups from the constraints that tracing wrote down: the relations solved, and what moves no tensor left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.groups.translation import Centre, Offset, Translation
from isoflat.symmetry.groups.units import UnitScaling, exponents
from isoflat.symmetry.relations import Form, Solution


def scaling(constraints: Constraints, solution: Solution) -> UnitScaling:
    """The group of scalings for a solution of the relations."""
    tensors = tuple(exponents(entry, solution) for entry in constraints.fields.values())
    runnings = tuple((running, solution.rows(running.deviation)) for running in constraints.runnings.values())
    norms = tuple((norm, solution.rows(torch.tensor(norm.factors, dtype=torch.int64))) for norm in constraints.norms)
    return UnitScaling(tuple(e for e in tensors if not e.still()), runnings, norms, solution.dimension)


def effective(constraints: Constraints, solution: Solution) -> Solution:
    """Without the coordinates that move no stored tensor."""
    matrices = [solution.rows(part) for entry in constraints.fields.values() for part in (entry.first, entry.second)]
    matrices += [solution.rows(running.deviation) for running in constraints.runnings.values()]
    used = np.zeros(solution.dimension, dtype=bool)
    for matrix in matrices:
        used[np.unique(matrix.indices)] = True
    return solution.restricted(used)


def translation(constraints: Constraints, zero: tuple[Form, ...] = ()) -> Translation:
    """The group of shifts."""
    solution = constraints.shifts.solve(zero)
    ids: list[Tensor] = []
    for entry in constraints.additives.values():
        ids.append(entry.shift)
        if entry.absorbed is not None:
            ids.append(entry.absorbed.shift)
    for running in constraints.runnings.values():
        ids += [running.entering, running.moved, *([running.absorbed.shift] if running.absorbed is not None else [])]
    used = np.zeros(solution.dimension, dtype=bool)
    for part in ids:
        used[np.unique(solution.rows(part).indices)] = True
    solution = solution.restricted(used)
    offsets = tuple(
        Offset(
            entry, solution.rows(entry.shift), None if entry.absorbed is None else solution.rows(entry.absorbed.shift)
        )
        for entry in constraints.additives.values()
    )
    centres = tuple(
        Centre(
            running,
            solution.rows(running.entering),
            solution.rows(running.moved),
            None if running.absorbed is None else solution.rows(running.absorbed.shift),
        )
        for running in constraints.runnings.values()
    )
    return Translation(offsets, centres, solution.dimension)


def movable_offsets(shifts: Translation) -> set[str]:
    """Names of additive tensors all of whose constants can be moved."""
    return {offset.entry.name for offset in shifts.offsets if bool((np.diff(offset.own.indptr) > 0).all())}
