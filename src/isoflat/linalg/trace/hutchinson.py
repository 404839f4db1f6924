"""Hutchinson's estimator: a fixed number of probes, or as many as a pilot says that a tolerance takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from isoflat.core.errors import UsageError
from isoflat.linalg.solver import Domain, Steps
from isoflat.linalg.trace.base import (
    REACHED,
    Deflating,
    ProjectedProbes,
    QuadraticForms,
    TraceEstimate,
    along,
    ask,
    check,
    clock,
    deviation,
    doubt,
    mean,
    quantile,
)
from isoflat.linalg.vectors import Distribution


@final
@dataclass(frozen=True, eq=False)
class Hutchinson(Deflating[TraceEstimate]):
    """Hutchinson's estimator (1990), the mean of `vᵀ A v`; with signs as probes exact for diagonal matrices.

    *Variance* of one form: `2 (‖A‖_F² − Σ a_ii²)` with signs, `2 ‖A‖_F²` with Gaussian probes.

    *Deflation.* `tr A = tr(Xᵀ A X) + tr(P A P)` with `P = I − X Xᵀ`: the first part takes d products and is exact, the
    second has projected probes, and neither an outlier's variance nor its skewness.

    *Tolerance.* Stopping when the running mean looks settled, or as soon as the interval is narrow enough, voids the
    interval: it stops where the samples are close together by luck. With `rtol` the procedure is that of Stein (1945)
    in two stages: the variance of a pilot of `probes` samples fixes how many there are in all, and the half width keeps
    the pilot's variance and its degrees of freedom, whatever the further samples look like. Stein's width is absolute;
    here it is a fraction of the trace, for which the pilot's mean stands, one standard error closer to zero. Measured
    coverage stays within 1 % of the nominal 95 %, with pilots from 10 samples on and a trace from three times smaller to
    ten times larger than one form's deviation. Running out of time does not depend on the samples, and leaves the
    interval as good.

    *When not to trust it.* Student's interval wants forms that are nearly normal. Where few eigenvalues carry the
    variance they are skewed: `TraceEstimate.doubt` says so, by a rule that was measured (`trace.base.doubt`). The
    remedy is to deflate them.

    Attributes:
        probes: number of probes, at least 2; that of the pilot where there is a tolerance.
        confidence: nominal coverage of the t-interval.
        block: probes that share a pass over the data; it does not change which probes are drawn.
        distribution: distribution of the probes.
        rtol: relative width of the interval to reach; None for `probes` probes and no more.
        max_products: budget of a run with a tolerance, the directions included.
        seconds: budget of wall-clock time, looked at between passes; None for no limit. Two probes are always taken.
        directions: orthonormal columns to deflate, shape `(n, d)`; None for none.

    Raises:
        UsageError: a setting has no meaning, or the directions do not fit or are not orthonormal.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> Hutchinson(probes=4)(Dense(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))), stream(0)).value
    3.0
    """

    label: ClassVar[str] = "Hutchinson"

    probes: int = 64
    confidence: float = 0.95
    block: int = 8
    distribution: Distribution = Distribution.RADEMACHER
    rtol: float | None = None
    max_products: int = 300
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check(self.probes, self.confidence, self.block)
        if self.rtol is None:
            return
        needed = self.probes + (0 if self.directions is None else self.directions.shape[-1])
        if not self.rtol > 0:
            raise UsageError(f"rtol must be positive, got {self.rtol}")
        if needed > self.max_products:
            raise UsageError(
                f"directions and pilot take {needed} products, more than the budget of {self.max_products}"
            )

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[TraceEstimate]:
        """Multiply the directions, take the pilot, then as many probes as it asks for."""
        expired = clock(self.seconds)
        rows = self.basis(domain)
        exact, probes = QuadraticForms(), ProjectedProbes(rows, domain, self.distribution, stream)
        used = yield from ask(along(rows), exact.take, len(rows), self.block, domain, "trace: direction")

        def sample(count: int) -> Steps[int]:
            taken = len(probes.forms.values)
            return ask(
                probes.draw,
                probes.take,
                count - taken,
                self.block,
                domain,
                "trace: probe",
                over=lambda done: taken + done > 1 and expired(),
            )

        yield from sample(self.probes)  # the first stage of Stein's procedure
        pilot = _PilotSamples.of(probes.forms, math.fsum(exact.values), math.fsum(exact.noise), self)
        planned = pilot.planned(self.max_products - used)  # fixed here, whatever the further samples look like
        yield from sample(planned)
        return self._result(pilot, planned, probes.forms, used)

    def _result(self, pilot: _PilotSamples, planned: int, forms: QuadraticForms, used: int) -> TraceEstimate:
        taken = len(forms.values)
        value = pilot.exact + mean(forms.values)
        error = pilot.deviation / math.sqrt(taken)
        half = pilot.quantile * error + pilot.rounding
        if self.rtol is None:
            reached, stopped = taken == self.probes, f"all {self.probes} probes taken"
        else:
            reached = 2 * half <= self.rtol * abs(value)
            stopped = REACHED if reached else pilot.reason(planned)
        if taken < planned and not reached:
            stopped = f"budget of {self.seconds:g} seconds spent"
        return TraceEstimate(
            value=value,
            standard_error=error,
            half_width=half,
            confidence=self.confidence,
            products=used + taken,
            samples=tuple(pilot.exact + form for form in forms.values),
            rounding=pilot.rounding,
            concentration=forms.concentration,
            effective_rank=forms.effective_rank,
            doubt=doubt(pilot.size, forms.concentration, pilot.quantile * error <= pilot.rounding),
            reached=reached,
            stopped=stopped,
        )


@final
@dataclass(frozen=True)
class _PilotSamples:
    """Statistics of the first samples (Stein's first stage), and the number of samples that the tolerance takes.

    Attributes:
        settings: settings of the run.
        size: number of samples.
        exact: part of the trace along the directions.
        value: estimate of the trace from the pilot.
        deviation: sample standard deviation of one form.
        quantile: t-quantile with the pilot's degrees of freedom.
        rounding: possible rounding error of the value.
    """

    settings: Hutchinson
    size: int
    exact: float
    value: float
    deviation: float
    quantile: float
    rounding: float

    @staticmethod
    def of(forms: QuadraticForms, exact: float, noise: float, settings: Hutchinson) -> _PilotSamples:
        """Statistics of the forms taken so far."""
        size = len(forms.values)
        return _PilotSamples(
            settings=settings,
            size=size,
            exact=exact,
            value=exact + mean(forms.values),
            deviation=deviation(forms.values),
            quantile=quantile(settings.confidence, size - 1),
            rounding=noise + forms.rounding,
        )

    @property
    def wanted(self) -> float:
        """Samples that make the interval as narrow as asked; infinite if no number is known to do so."""
        half = (self.settings.rtol or 0.0) / 2
        error = self.deviation / math.sqrt(self.size)
        if self.quantile * error + self.rounding <= half * abs(self.value) or self._rounded:
            return self.size
        room = half * (abs(self.value) - error) - self.rounding
        if room <= 0:
            return math.inf
        ratio = self.quantile * self.deviation / room
        return ratio * ratio

    def planned(self, budget: int) -> int:
        """Number of samples in all, within a budget of products."""
        if self.settings.rtol is None:
            return self.settings.probes
        return max(self.size, math.ceil(min(self.wanted, budget)))

    def reason(self, planned: int) -> str:
        """Reason that the planned number of samples was not enough, in words."""
        if self._rounded:
            return "as tight as rounding allows"
        if planned >= self.wanted:
            return "the trace turned out smaller than the pilot promised"
        spent = f"budget of {self.settings.max_products} products spent"
        if self.wanted == math.inf:
            return f"{spent}; the pilot cannot tell the trace from zero"
        return f"{spent}; the tolerance takes about {self.wanted:.2g} probes"

    @property
    def _rounded(self) -> bool:
        """Flag that rounding alone exceeds the tolerance."""
        return self.rounding > (self.settings.rtol or 0.0) / 2 * abs(self.value)
