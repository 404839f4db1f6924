"""Gain folding: deviations of batch normalisations are made one, and gains go into their readers.

It comes before anything is balanced (docs/concepts/canonical.md, "Gain folding").
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from isoflat.core.state import State
from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.gains import foldable_at
from isoflat.symmetry.groups.translation import deviation
from isoflat.symmetry.groups.units import UnitScaling
from isoflat.symmetry.relations import Solution


def fold_gains(
    constraints: Constraints, solution: Solution, group: UnitScaling, state: State
) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """Unknowns that are fixed before anything is minimised, and their values; gains' entries that go into readers."""
    fixed: list[int] = []
    targets: list[float] = []
    for running in constraints.runnings.values():
        moves = np.diff(solution.rows(running.deviation).indptr) > 0
        logs = deviation(running, state).log().cpu()
        fixed += running.deviation[torch.from_numpy(moves)].tolist()
        targets += (-logs[torch.from_numpy(moves)]).tolist()
    folded: dict[str, Tensor] = {}
    for name, mask in foldable_at(constraints, solution, group, state).items():
        gain = state.tensors[name].cpu().reshape(-1)
        mask = mask & (gain != 0)
        if bool(mask.any()):
            folded[name] = mask.view(state.tensors[name].shape)
            fixed += constraints.fields[name].first.reshape(-1)[mask].tolist()
            targets += (-gain[mask].abs().log()).tolist()
    return fixed, targets, folded
