"""Stochastic traces with an honest interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from scipy.stats import t as student

from isoflat.core import space
from isoflat.core.errors import UsageError
from isoflat.linalg.probes import rademacher
from isoflat.linalg.solver import Domain, Request, Solver, Steps


@final
@dataclass(frozen=True)
class TraceEstimate:
    """Mean of `vᵀ A v` over probes with its Student t-interval.

    Attributes:
        value: the mean.
        standard_error: sample standard deviation over `√probes`.
        half_width: t-quantile times the standard error.
        confidence: nominal coverage of `value ± half_width`.
        products: products used.
    """

    value: float
    standard_error: float
    half_width: float
    confidence: float
    products: int


@final
@dataclass(frozen=True)
class Hutchinson(Solver[TraceEstimate]):
    """Hutchinson's estimator (1990) with Rademacher probes: exact for diagonal matrices.

    The number of probes is fixed beforehand: stopping when the running mean looks settled would void the interval.
    Student's interval wants forms that are nearly normal. Where a single eigenvalue carries the trace they are skewed,
    and 64 probes cover 93 % instead of 95 %.

    Attributes:
        probes: number of probes, at least 2.
        confidence: nominal coverage of the t-interval.
        block: probes that share a pass over the data; it does not change which probes are drawn.

    >>> from isoflat.core.streams import stream
    >>> from isoflat.linalg.operator import Dense
    >>> Hutchinson(probes=4)(Dense(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))), stream(0)).value
    3.0
    """

    probes: int = 64
    confidence: float = 0.95
    block: int = 8

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        if self.probes < 2 or self.block < 1:
            raise UsageError(f"a standard error needs at least 2 probes, got {self.probes} in blocks of {self.block}")
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence must lie strictly between 0 and 1, got {self.confidence}")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[TraceEstimate]:
        """Average `vᵀ A v` over the probes."""
        samples: list[float] = []
        while len(samples) < self.probes:
            k = min(self.block, self.probes - len(samples))
            vectors = rademacher(domain.n, k, stream).to(device=domain.device, dtype=domain.dtype)
            products = yield Request(vectors, status=f"trace: probe {len(samples) + 1} of {self.probes}")
            samples += [float(space.inner([vectors[:, j]], products[:, j])[0]) for j in range(k)]
        mean = math.fsum(samples) / len(samples)
        variance = math.fsum((sample - mean) ** 2 for sample in samples) / (len(samples) - 1)
        error = math.sqrt(variance / len(samples))
        quantile = float(student.ppf(0.5 + self.confidence / 2, len(samples) - 1))
        return TraceEstimate(mean, error, quantile * error, self.confidence, len(samples))
