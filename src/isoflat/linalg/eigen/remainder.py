"""Bounds on the spectrum on the complement of one vector, as a solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.linalg.eigen.complement import ComplementBounds, RitzBasis, StoppingRule, complement_bounds
from isoflat.linalg.solver import Domain, Request, Solver, Steps

CLEAR = 0.25
"""Share of the gap to the vector's own value that a bound may take: a residual then costs 4/3 of the least."""


@final
@dataclass(frozen=True, eq=False)
class Remainder(Solver[ComplementBounds]):
    """Bounds on the spectrum on a vector's complement, tight enough to tell it from the vector's Rayleigh quotient.

    Attributes:
        vector: unit vector, shape `(n,)`.
        confidence: probability that both bounds hold.
        max_products: largest number of products, the one with the vector included.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> operator = Dense(torch.diag(torch.cat([torch.tensor([9.0]), torch.linspace(0, 1, 99)]).double()))
    >>> left = Remainder(torch.eye(100, dtype=torch.float64)[0])(operator, stream(0))
    >>> left.lower <= 0.0, 1.0 <= left.upper < 3.0
    (True, True)
    """

    label: ClassVar[str] = "Remainder"

    vector: Tensor
    confidence: float = 1 - 1e-6
    max_products: int = 300

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[ComplementBounds]:
        """Multiply the vector, then run Lanczos on its complement."""
        status = "what a vector leaves"
        product = (yield Request(self.vector[:, None].to(domain.dtype), status=status))[:, 0]
        trial = RitzBasis.of([self.vector], [product])
        size = abs(float(trial.values[0]))

        def enough(left: ComplementBounds) -> bool:
            above = left.upper - left.top <= CLEAR * (size - left.top)
            return above and left.bottom - left.lower <= CLEAR * (size + left.bottom)

        rule = StoppingRule(1 - self.confidence, enough, lambda spent: spent + 1 <= self.max_products, status)
        return (yield from complement_bounds(trial, domain, stream, (None,), rule))
