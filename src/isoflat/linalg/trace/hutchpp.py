"""Hutch++: the trace is exact on the range of a random sketch, and sampled on the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from isoflat.core.errors import UsageError
from isoflat.linalg.solver import Domain, Solver, Steps
from isoflat.linalg.trace.base import TraceEstimate, ask, check, exact_trace
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.trace.span import Span
from isoflat.linalg.vectors import Distribution


@final
@dataclass(frozen=True)
class HutchPlusPlus(Solver[TraceEstimate]):
    """Hutch++ (Meyer, Musco, Musco, Woodruff 2021, arXiv 2010.09649).

    The products of a few random signs span Q; `tr A = tr(Qᵀ A Q) + tr(P A P)` with `P = I − Q Qᵀ`: the first part is
    exact, the second is Hutchinson's with probes of its own, and the interval is that of the second part. Given Q its
    samples are independent, so that Student's interval is as good as theirs: on flat, linear, geometric (0.9ʲ), power
    law, outlier and indefinite spectra 94 to 96 % with the default sizes. What a small sketch leaves of a spectrum that
    decays faster is again dominated by few eigenvalues: with 10 probes and 0.7ʲ 91 to 92 %, and `doubt` says so.

    Where the products would be enough for all unit vectors, these are taken, and the trace is exact.

    Attributes:
        sketch: columns of the sketch; it takes at most twice as many products.
        probes: number of probes for the rest, at least 2.
        confidence: nominal coverage of the t-interval.
        block: vectors that share a pass over the data.
        distribution: distribution of sketch and probes.

    Raises:
        UsageError: a setting has no meaning.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> rank_one = torch.outer(torch.arange(50.0, dtype=torch.float64), torch.arange(50.0, dtype=torch.float64))
    >>> round(HutchPlusPlus(sketch=2, probes=4)(Dense(rank_one), stream(0)).value / float(rank_one.trace()), 12)
    1.0
    """

    label: ClassVar[str] = "HutchPlusPlus"

    sketch: int = 20
    probes: int = 40
    confidence: float = 0.95
    block: int = 8
    distribution: Distribution = Distribution.RADEMACHER

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check(self.probes, self.confidence, self.block)
        if self.sketch < 1:
            raise UsageError(f"a sketch needs at least 1 column, got {self.sketch}; without one, use Hutchinson")

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[TraceEstimate]:
        """Sketch, orthonormalise, then run Hutchinson's estimator with the sketch deflated."""
        if 2 * self.sketch + self.probes >= domain.n:
            return (yield from exact_trace(domain, self.block, self.confidence))
        span = Span(domain.n, self.sketch, domain.dtype, domain.device)
        used = yield from ask(
            lambda k: self.distribution.columns(domain.n, k, stream),
            lambda _, product: span.take(product),
            self.sketch,
            self.block,
            domain,
            "trace: sketch",
        )
        rest = Hutchinson(self.probes, self.confidence, self.block, self.distribution, directions=span.rows.T)
        found = yield from rest.steps(domain, stream)
        return replace(found, products=found.products + used)
