"""Bounds on both ends of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import final

from torch import Tensor

REACHED = "tolerance reached"
"""Reason that a run gives for its end where it met the tolerance."""

ROUNDING = "as tight as rounding allows"
"""Reason that a run gives for its end where the tolerance lies below the precision of its products."""


class Which(StrEnum):
    """Choice of the eigenvalue: the largest, the smallest, or the one of largest magnitude."""

    LARGEST = "largest"
    SMALLEST = "smallest"
    MAGNITUDE = "magnitude"


@final
@dataclass(frozen=True)
class End:
    """Two-sided bound on the eigenvalue at one end of the spectrum.

    Attributes:
        value: Rayleigh quotient; the eigenvalue lies beyond it (further out), up to `slack`.
        bound: outer bound on the eigenvalue, with the run's confidence; infinite if uncertified.
        slack: rounding error of `value` itself.
        residual: `‖A x − value·x‖` from a product of its own; None if only the recurrence looked at this end.
        vector: Ritz vector x, shape `(n,)`.
    """

    value: float
    bound: float
    slack: float
    residual: float | None
    vector: Tensor


@final
@dataclass(frozen=True)
class Extremes:
    """Both ends of a spectrum.

    Attributes:
        bottom: bound on the smallest eigenvalue.
        top: bound on the largest eigenvalue.
        which: end that was refined.
        reached: flag that the tolerance was reached.
        confidence: probability that every bound holds; 0 if uncertified.
        noise: estimated rounding error of a product along the Ritz vector.
        products: products used, the final ones included.
        stopped: reason for the end of the run, in words.
    """

    bottom: End
    top: End
    which: Which
    reached: bool
    confidence: float
    noise: float
    products: int
    stopped: str

    @property
    def wanted(self) -> End:
        """End that was asked for; for `Which.MAGNITUDE` the one that is larger in absolute value.

        Only one end has had a product of its own in the end; on a tie, where rounding decides, it is that one.
        """
        if self.which is Which.MAGNITUDE:
            return max(self.top, self.bottom, key=lambda end: (end.residual is not None, abs(end.value)))
        return self.top if self.which is Which.LARGEST else self.bottom

    def interval(self) -> tuple[float, float]:
        """Enclosure of the eigenvalue asked for; of the spectral norm for `Which.MAGNITUDE`."""
        end = self.wanted
        if self.which is Which.MAGNITUDE:
            return max(abs(end.value) - end.slack, 0.0), max(self.top.bound, -self.bottom.bound, abs(end.value))
        inner = end.value - end.slack if end is self.top else end.value + end.slack
        return (inner, end.bound) if end is self.top else (end.bound, inner)
