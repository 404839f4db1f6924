"""Found eigenvectors with fresh products, and the bounds on the spectrum that follow from bounds on their complement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from isoflat.linalg.eigen.complement import ComplementBounds, RitzBasis
from isoflat.linalg.eigen.pairs import Reals


@final
@dataclass(frozen=True)
class Verified:
    """The wanted vectors with fresh products; arrays are of the largest, descending, then of the smallest, ascending.

    Attributes:
        trial: wanted vectors with their products.
        top: number of largest eigenvalues wanted.
        bottom: number of smallest eigenvalues wanted.
        discrepancy: distance of the products from what the search predicted.
        rounding: rounding error of the search.
        size: largest magnitude that the search met.
        working: precision of the search's products, and of those of a certificate.
        final: precision of the fresh products.
    """

    trial: RitzBasis
    top: int
    bottom: int
    discrepancy: float
    rounding: float
    size: float
    working: float
    final: float

    @property
    def values(self) -> Reals:
        """Ritz values, ascending."""
        return self.trial.values

    @property
    def wanted(self) -> Reals:
        """Ritz values that are asked for, in the order of `slots`."""
        return self.values[slots(len(self.values), self.top, self.bottom)]

    @property
    def residuals(self) -> Reals:
        """Residuals of the wanted values, in the same order."""
        found = [self.trial.residual(j) for j in range(len(self.values))]
        return np.array(found)[slots(len(found), self.top, self.bottom)]

    def noise(self, magnitude: float, steps: int = 0) -> float:
        """Rounding error of products, after so many steps on the complement, where magnitudes reach so far."""
        return self.discrepancy + self.rounding + (self.working * steps + self._sums) * max(self.size, magnitude)

    def slack(self, magnitude: float) -> float:
        """Rounding error of the values."""
        own = 4 * self.final * (len(self.values) + 1)
        return self.discrepancy * self.final / self.working + (own + self._sums) * max(self.size, magnitude)

    @property
    def _sums(self) -> float:
        """Relative error of a sum over n entries, which is in float64 in any case."""
        return torch.finfo(torch.float64).eps * math.sqrt(self.trial.vectors[0].shape[0])

    def bounds(self, left: ComplementBounds) -> tuple[Reals, Reals]:
        """Bounds on the wanted eigenvalues and on the next ones, from bounds on the complement.

        Returns:
            Bounds from above on the largest eigenvalues, descending, and on the next one after them; and from below on the
            smallest, ascending, and on the next one.
        """
        noise, slack = self.noise(left.magnitude, left.steps), self.slack(left.magnitude)
        lower, upper = left.lower - noise, left.upper + noise
        high, low = self.trial.bounds(lower, upper)
        return np.append(high[::-1] + slack, upper)[: self.top + 1], np.append(low - slack, lower)[: self.bottom + 1]

    def exact(self) -> tuple[Reals, Reals]:
        """Bounds where the vectors span the whole space, so that there is no complement."""
        high, low = np.append(self.values[::-1], -math.inf), np.append(self.values, math.inf)
        return high[: self.top + 1] + self.slack(0.0), low[: self.bottom + 1] - self.slack(0.0)

    def widths(self, highs: Reals, lows: Reals, magnitude: float) -> Reals:
        """Widths of the enclosures that such bounds make, in the order of `slots`."""
        outer, inner = np.concatenate([highs[: self.top], -lows[: self.bottom]]), self.wanted.copy()
        inner[self.top :] *= -1
        return outer - inner + self.slack(magnitude)


def slots(found: int, top: int, bottom: int) -> list[int]:
    """Places, among so many ascending values, of the largest, descending, then of the smallest, ascending.

    >>> slots(10, 2, 3)
    [9, 8, 0, 1, 2]
    """
    return [*range(found - 1, found - 1 - top, -1), *range(bottom)]
