"""Scores scaled until the loss has a given value, so that networks of unequal loss can be compared at an equal one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import TargetLoss

SPAN = 20
"""Powers of two by which scores may grow or shrink."""


def scaled(risk: EmpiricalRisk, state: State, loss: TargetLoss, wanted: float) -> tuple[EmpiricalRisk, str]:
    """The risk with scores times the factor that brings it to what is wanted, and a note that says which.

    Cross-entropy is convex in the factor, falls from that of equal scores at 0, and may rise again where a network is wrong
    and sure: the factor is the smaller of the two that do it. A dozen forward passes.

    Raises:
        UsageError: no factor does.
    """
    from scipy.optimize import brentq

    @cache
    def excess(factor: float) -> float:
        return replace(risk, loss=loss.scaled(factor)).value(state) - wanted

    if excess(0.0) <= 0:
        raise UsageError(
            f"logits='{loss.logits}' cannot be had: equal scores for all classes have a loss of {wanted + excess(0.0):.4g}. Ask "
            "for less"
        )
    below, least = _below(excess)
    if least > 0:
        raise UsageError(
            f"logits='{loss.logits}' cannot be had: whatever its scores are multiplied by, the loss of this network stays at "
            f"{wanted + least:.4g} or above. Ask for more"
        )
    precision = max(torch.finfo(state.dtype).eps, 4 * sys.float_info.epsilon)
    found: Any = brentq(excess, 0.0, below, xtol=sys.float_info.min, rtol=precision)
    factor = float(found)
    note = f"scores were multiplied by {factor:.6g}, which brings the loss to {wanted:g}"
    return replace(risk, loss=loss.scaled(factor)), note


def _below(excess: Callable[[float], float]) -> tuple[float, float]:
    """A factor at which the loss is at most what is wanted, or lowest, and by how much it is above."""
    from scipy.optimize import minimize_scalar

    for k in range(SPAN + 1):
        for factor in (2.0**k, 2.0**-k):
            if excess(factor) <= 0:
                return factor, excess(factor)
    best = min(range(-SPAN, SPAN + 1), key=lambda k: excess(2.0**k))
    ends = ((best - 1) * math.log(2), (best + 1) * math.log(2))
    found = minimize_scalar(lambda log: excess(math.exp(log)), bounds=ends)
    return math.exp(found.x), float(found.fun)
