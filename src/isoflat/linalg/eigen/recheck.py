"""Check of a stored extreme eigenvalue by two products: with its eigenvector, and with a random vector."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.core.space import inner, norm
from isoflat.linalg.eigen.extremes import Which
from isoflat.linalg.solver import Domain, Request, SolverWithVectors, Steps
from isoflat.linalg.vectors import orthogonalise, sphere

ROUNDINGS = 100
"""Relative error allowed to a product, in units of float64 rounding."""


@final
@dataclass(frozen=True)
class RecheckResult:
    """Result of the two products of a recheck, in float64.

    Attributes:
        rayleigh: Rayleigh quotient ρ of the witness.
        residual: norm r of its residual.
        low: smallest Ritz value of the span of both vectors.
        high: largest Ritz value of that span.
        length: norm of A on that span.
        rounding: error of the products, by their sizes and their asymmetry.
    """

    rayleigh: float
    residual: float
    low: float
    high: float
    length: float
    rounding: float

    def proved(self, which: Which) -> float:
        """Proved bound on the number, whatever the witness: from below, for a smallest eigenvalue from above."""
        return {Which.MAGNITUDE: self.length, Which.LARGEST: self.high, Which.SMALLEST: self.low}[which]


@final
@dataclass(frozen=True, eq=False)
class Recheck(SolverWithVectors[RecheckResult]):
    """Solver that takes two products in float64: with the witness, and with a random vector orthogonal to it.

    Half of the second one is uniform on the sphere, half is the witness's residual: more is hidden there, if anywhere.

    Attributes:
        witness: vector of shape `(n,)`, of any length but zero.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> seen = Recheck(torch.tensor([0.0, 2.0]))(Dense(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))), stream(0))
    >>> round(seen.rayleigh, 9), round(seen.high, 9), round(seen.length, 9)
    (1.0, 3.0, 3.0)
    """

    label: ClassVar[str] = "Recheck"

    witness: Tensor

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[RecheckResult]:
        """Ask twice; once where there is one dimension only."""
        x = self.witness.to(domain.device, torch.float64)
        x = x / norm(x)
        image = (yield Request(x[:, None], double=True, status="the witness"))[:, 0]
        rayleigh, size = float(inner([x], image)[0]), norm(image)
        rest = torch.sub(image, x, alpha=rayleigh)
        residual = norm(rest)
        eps = ROUNDINGS * torch.finfo(torch.float64).eps
        y = sphere(domain.n, stream).to(domain.device)
        if residual > eps * size:  # else it has rounding only
            y = y + rest / residual
        left = orthogonalise([x], y)[1]
        if left <= eps:
            return RecheckResult(rayleigh, residual, rayleigh, rayleigh, size, eps * size)
        y = y / left
        other = (yield Request(y[:, None], double=True, status="a random vector"))[:, 0]
        small = torch.stack([inner([x, y], part) for part in (image, other)]).cpu()
        lengths = torch.stack([inner([image, other], part) for part in (image, other)]).cpu()
        ritz = torch.linalg.eigvalsh((small + small.mT) / 2)
        largest = math.sqrt(max(float(torch.linalg.eigvalsh(lengths)[-1]), 0.0))
        asymmetry = abs(float(small[0, 1] - small[1, 0]))
        return RecheckResult(rayleigh, residual, float(ritz[0]), float(ritz[-1]), largest, eps * largest + asymmetry)
