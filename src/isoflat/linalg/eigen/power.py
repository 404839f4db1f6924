"""The power method of the paper, for comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.eigen.extremes import REACHED, End, Extremes, Which
from isoflat.linalg.maps import LinearMap
from isoflat.linalg.solver import Domain, Request, Solver, Steps
from isoflat.linalg.vectors import sphere


@final
@dataclass(frozen=True)
class PowerMethod(Solver[Extremes]):
    """The Riemannian power method of Rangamani et al. 2019, kept for comparison; made safe against the sign.

    `v ← D² H v`, normalised in the metric, is `u ← Eᵀ H E u` in the frame's coordinates `v = E u`. It stops when the
    relative Euclidean change of v is below `tol`. NOTE: the published code compares `v` with its predecessor as it is,
    so that a dominant negative eigenvalue, for which v changes sign at each step, never stops; here the change is
    taken up to the sign. It says nothing about the error: there is no outer bound.

    Attributes:
        frame: frame E, used by the stopping rule only; None for the identity.
        tol: relative change of v at which the iteration stops; the paper's 1e-8.
        max_products: largest number of products; the paper's 1000.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> run = PowerMethod()(Dense(torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))), stream(0))
    >>> round(run.wanted.value, 12), run.reached
    (-2.0, True)
    """

    label: ClassVar[str] = "PowerMethod"

    frame: LinearMap | None = None
    tol: float = 1e-8
    max_products: int = 1000

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Extremes]:
        """Multiply and normalise until the direction stands still."""
        u = sphere(domain.n, stream).to(domain.device)
        change, products, stopped = math.inf, 0, ""
        while True:
            reply = yield Request(u[:, None].to(domain.dtype), status=f"power {products}: change {change:.1e}")
            product = reply[:, 0]
            products += 1
            value = float(space.inner([u], product)[0])
            size = space.norm(product)
            if size == 0:
                stopped = "every product vanished"
            elif change < self.tol:
                stopped = REACHED
            elif products >= self.max_products:
                stopped = f"budget of {self.max_products} products spent"
            if stopped:
                break
            following = product / size
            old, new = self._push(u), self._push(following)
            change = min(space.norm(new - old), space.norm(new + old)) / space.norm(old)
            u = following
        residual = space.norm(product - value * u)
        # A Rayleigh quotient lies within the spectrum, whichever end it has run to.
        found, other = End(value, math.inf, residual, residual, u), End(value, -math.inf, residual, None, u)
        if value < 0:
            found, other = replace(found, bound=-math.inf), replace(other, bound=math.inf)
        bottom, top = (found, other) if value < 0 else (other, found)
        reached = size == 0 or change < self.tol
        return Extremes(bottom, top, Which.MAGNITUDE, reached, 0.0, 0.0, products, stopped)

    def _push(self, u: Tensor) -> Tensor:
        return u if self.frame is None else self.frame.push(u[:, None])[:, 0]
