"""A whole spectrum: outliers first, then the density of the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from isoflat.core.density import Density
from isoflat.core.errors import UsageError
from isoflat.linalg.density.lanczos import StochasticLanczosQuadrature
from isoflat.linalg.density.outliers import Outliers
from isoflat.linalg.solver import Domain, Solver, Steps


@final
@dataclass(frozen=True)
class Deflated(Solver[Density]):
    """Spectral density in two stages: outliers by one Lanczos run, then the density of the rest by random probes.

    Attributes:
        outliers: largest number of eigenvalues that are taken out.
        probes: number of random probes.
        depth: products per probe, and of the run that looks for outliers.
        confidence: probability that the band holds everywhere.
        max_products: largest number of products in all.
        seconds: budget of wall-clock time, a third of it for the outliers; None for no limit.

    Raises:
        UsageError: a setting has no meaning, or the budget allows for nothing.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> bulk = torch.linspace(0, 1, 400, dtype=torch.float64)
    >>> operator = Dense(torch.diag(torch.cat([torch.tensor([1e6], dtype=torch.float64), bulk])))
    >>> density = Deflated(probes=4, depth=32)(operator, stream(0))
    >>> [round(outlier.value, 6) for outlier in density.outliers], density.wasserstein < 0.15
    ([1000000.0], True)
    """

    label: ClassVar[str] = "Deflated"

    outliers: int = 24
    probes: int = 4
    depth: int = 64
    confidence: float = 0.95
    max_products: int = 1000
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        least = 2 * (self.probes + 1)
        if self.outliers < 0 or self.probes < 1 or self.depth < 2:
            raise UsageError(
                f"expected outliers from 0, probes from 1 and steps from 2 on, got {self.outliers}, {self.probes} and "
                f"{self.depth}"
            )
        if self.max_products < least:
            raise UsageError(
                f"a spectrum with {self.probes} probes takes {least} products or more, got a budget of "
                f"{self.max_products}: raise it, or take fewer probes"
            )

    @staticmethod
    def price(outliers: int, probes: int, depth: int, budget: int | None) -> int:
        """The budget, or what everything takes if there is none."""
        return probes * depth + (depth + outliers if outliers > 0 else 0) if budget is None else budget

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[Density]:
        """Run both stages; probes are drawn from the stream after the first run's start, and so are independent of it."""
        density = StochasticLanczosQuadrature(
            self.probes, self.depth, self.confidence, max_products=self.max_products, seconds=self.seconds
        )
        if not self.outliers or density.takes_all(domain.n):
            return (yield from density.steps(domain, stream))
        share = min(self.depth, self.max_products // (self.probes + 1))
        third = None if self.seconds is None else self.seconds / 3
        found = yield from Outliers(self.outliers, share, third).steps(domain, stream)
        rest = replace(
            density,
            max_products=self.max_products - found.products,
            seconds=None if third is None else 2 * third,
            directions=found.directions,
        )
        result = yield from rest.steps(domain, stream)
        return replace(result, products=result.products + found.products)
