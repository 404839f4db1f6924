"""Corrections of p-values for having tried many measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import false_discovery_control


def holm(ps: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p-values: below α at most with probability α if no measure is related, however they depend.

    Args:
        ps: p-values, one per measure.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    order = np.argsort(ps, kind="stable")
    scaled = np.asarray(ps, dtype=float)[order] * np.arange(len(ps), 0, -1)
    adjusted = np.empty(len(ps))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return tuple(adjusted.tolist())


def benjamini_hochberg(ps: Sequence[float]) -> tuple[float, ...]:
    """Benjamini and Hochberg's adjusted p-values: of the measures below α, about a share α is expected to be false.

    Proven for independent or positively dependent tests, which measures of the same networks usually are.

    Args:
        ps: p-values, one per measure.

    >>> benjamini_hochberg([0.01, 0.04, 0.03])
    (0.03, 0.04, 0.04)
    """
    return tuple(false_discovery_control(ps, method="bh").tolist())
