"""Report on the symmetries found, line by line, and on what holds the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.groups.basis import BasisChange
from isoflat.symmetry.groups.translation import CommonVector, Translation
from isoflat.symmetry.groups.units import UnitScaling
from isoflat.symmetry.relations import Solution

UNCLAIMED = "not claimed"
"""Kind of the lines that name what is no symmetry."""

AVOIDABLE = ("no bias", "zero padding", "ways", "used twice", "masked whole")
"""Endings of the reasons for which a constant is held though no nonlinearity asks for it."""


@final
@dataclass(frozen=True)
class SymmetryLine:
    """One line of the report: how many dimensions act on which tensors, or what does not move and why.

    Attributes:
        kind: "scale", "scale divided out", "shift", "common vector" ("read": by what reads, not writes), "basis",
            "rotation", or "not claimed".
        dimension: number of dimensions.
        tensors: names, each with the axis that is meant.
        reasons: for what is not claimed: operations that fix it.
    """

    kind: str
    dimension: int
    tensors: tuple[str, ...]
    reasons: tuple[str, ...] = ()


def lines(
    constraints: Constraints,
    scaling: UnitScaling,
    solution: Solution,
    others: tuple[Translation, CommonVector, BasisChange],
) -> tuple[SymmetryLine, ...]:
    """Groups of one kind with their dimensions and tensors, then what is not claimed and why.

    Args:
        constraints: unknowns and relations.
        scaling: the group of scalings where every epsilon is zero.
        solution: the scales that it was made of.
        others: shifts, common vectors and changes of basis.
    """
    translation, common, basis = others
    return (
        *_scales(scaling),
        *_shifts(translation),
        *_commons(common),
        *_bases(basis),
        *_unclaimed(constraints, solution, translation),
    )


def _scales(group: UnitScaling) -> Iterator[SymmetryLine]:
    touched: list[list[str]] = [[] for _ in range(group.size)]
    for entry in group.tensors:
        flat = entry.view[1] == 1 or entry.view[2] == 1
        for matrix, word in ((entry.first, "" if flat else " rows"), (entry.second, "" if flat else " columns")):
            for j in np.unique(matrix.indices):
                touched[j].append(f"{entry.name}{word}")
    for running, rows in group.runnings:
        for j in np.unique(rows.indices):
            touched[j].append(running.variance)
    divided = np.zeros(group.size, dtype=bool)
    for _, rows in group.norms:
        divided[np.unique(rows.indices)] = True
    counts = Counter((bool(divided[j]), tuple(dict.fromkeys(names))) for j, names in enumerate(touched))
    for (scale_free, names), count in counts.items():
        yield SymmetryLine("scale divided out" if scale_free else "scale", count, names)


def _shifts(group: Translation) -> Iterator[SymmetryLine]:
    touched: list[list[str]] = [[] for _ in range(group.size)]
    for offset in group.offsets:
        matrices = [offset.own] if offset.entering is None else [offset.own, offset.entering]
        for j in np.unique(np.concatenate([matrix.indices for matrix in matrices])):
            touched[j].append(offset.entry.name)
    for centre in group.centres:
        taken = [] if centre.absorbed is None else [centre.absorbed.indices]
        for j in np.unique(np.concatenate([centre.entering.indices, centre.moved.indices, *taken])):
            touched[j].append(centre.running.mean)
        for j in np.unique(centre.moved.indices):
            touched[j].append(str(centre.running.offset))
    for names, count in Counter(tuple(dict.fromkeys(names)) for names in touched).items():
        yield SymmetryLine("shift", count, names)


def _commons(group: CommonVector) -> Iterator[SymmetryLine]:
    for mean, length in zip(group.means, group.lengths, strict=True):
        yield SymmetryLine("common vector read" if mean.reads else "common vector", length, (mean.name,))


def _bases(group: BasisChange) -> Iterator[SymmetryLine]:
    for family in group.families:
        yield SymmetryLine("rotation" if family.orthogonal else "basis", family.count * family.freedom, family.names)


def _unclaimed(constraints: Constraints, solution: Solution, translation: Translation) -> Iterator[SymmetryLine]:
    """Units of stored tensors whose scale is fixed, with what fixes them; outputs and inputs are no reason to list."""
    gathered: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for entry in constraints.fields.values():
        flat = entry.view[1] == 1 or entry.view[2] == 1
        for ids, word in ((entry.first, "" if flat else " rows"), (entry.second, "" if flat else " columns")):
            rows = solution.rows(ids)
            fixed = ids.reshape(-1)[torch.from_numpy(np.diff(rows.indptr) == 0)]
            reasons = tuple(r for r in constraints.scales.reasons(fixed) if r != "output") if fixed.numel() else ()
            if reasons:
                gathered.setdefault(reasons, []).append((f"{entry.name}{word}", fixed.numel()))
    for offset in translation.offsets:
        fixed = offset.entry.shift[torch.from_numpy(np.diff(offset.own.indptr) == 0)]
        # A kink or an output that holds a constant goes without saying; what could have been otherwise does not.
        reasons = tuple(r for r in constraints.shifts.reasons(fixed) if r.endswith(AVOIDABLE)) if fixed.numel() else ()
        if reasons:
            gathered.setdefault(reasons, []).append((f"{offset.entry.name} (its shift)", fixed.numel()))
    for reasons, parts in gathered.items():
        yield SymmetryLine(UNCLAIMED, sum(count for _, count in parts), tuple(name for name, _ in parts), reasons)
