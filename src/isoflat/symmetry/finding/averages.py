"""Attention as an average: where every key of a row is masked, the result is zero, and no constant passes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from isoflat.symmetry.finding.constraints import Constraints
from isoflat.symmetry.finding.values import Known, Value
from isoflat.symmetry.motions import Average
from isoflat.symmetry.relations import ZERO, is_all


def average(constraints: Constraints, node: Node, mask: Node, constants: Tensor, value: Value = None) -> None:
    """Write down that constants pass a masked attention only where every row keeps a key.

    Args:
        constraints: unknowns and relations.
        node: the attention.
        mask: what decides which keys a row keeps.
        constants: unknown constants of the values.
        value: the mask, if it is known.
    """
    if is_all(constants, ZERO):
        return
    reason = constraints.where(node)
    if isinstance(value, Known) and not _every_row_keeps_a_key(value.value):
        constraints.shifts.pin(constants, f"{reason}: rows masked whole")
        return
    constraints.averages.append(Average(constants, reason, constraints.varies(mask)))


def _every_row_keeps_a_key(mask: Tensor) -> bool:
    kept = mask if mask.dtype == torch.bool else mask != -torch.inf
    return bool(kept.any(-1).all())
