"""What is known of both ends of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import final

from torch import Tensor

REACHED = "tolerance reached"
"""Why a run ended that did what was asked."""

ROUNDING = "as tight as rounding allows"
"""Why a run ended whose tolerance lies below what the precision of the products can give."""


class Which(StrEnum):
    """Which eigenvalue is asked for."""

    LARGEST = "largest"
    SMALLEST = "smallest"
    MAGNITUDE = "magnitude"


@final
@dataclass(frozen=True)
class End:
    """What is known of one end of the spectrum.

    Attributes:
        value: a Rayleigh quotient: the eigenvalue lies beyond it, up to `slack`.
        bound: the eigenvalue lies before it, with the run's confidence; infinite if uncertified.
        slack: error of `value` itself, from the rounding of products.
        residual: `‖A x − value·x‖` from a product of its own; None if only the recurrence looked at this end.
        vector: the Ritz vector x, shape `(n,)`.
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
        bottom: smallest eigenvalue.
        top: largest eigenvalue.
        which: the end that was refined until `reached`.
        reached: whether the tolerance was reached.
        confidence: probability that every bound holds; 0 if uncertified.
        noise: estimated rounding error of a product along the Ritz vector.
        products: products used, the final ones included.
        stopped: why the run ended, in words.
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
        """The end asked for; for `Which.MAGNITUDE` the one that is larger in absolute value.

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
