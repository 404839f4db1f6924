"""The Frobenius norm from the lengths of products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.linalg.solver import Domain, Steps
from isoflat.linalg.trace.base import (
    Deflating,
    ProjectedProbes,
    QuadraticForms,
    along,
    ask,
    check,
    deviation,
    doubt,
    quantile,
    unit,
)
from isoflat.linalg.vectors import Distribution, remove


@final
@dataclass(frozen=True)
class FrobeniusEstimate:
    """A Frobenius norm with its interval.

    Attributes:
        value: estimate of `‖A‖_F`, the root of an unbiased estimate of the square.
        lower: lower end of the interval.
        upper: upper end.
        standard_error: standard error of the value, to first order.
        confidence: nominal coverage.
        products: number of products used.
        exact: norm of the part that was not sampled.
        lengths: lengths `‖P A P v‖` per probe, in the order of drawing: `exact² + lengths_j²` estimates the square.
        rounding: possible rounding error, in order of magnitude.
        concentration: concentration of what was sampled, with the meaning it has in `TraceEstimate`.
        doubt: reason that the interval may cover less often than stated; empty where nothing speaks against it.
    """

    value: float
    lower: float
    upper: float
    standard_error: float
    confidence: float
    products: int
    exact: float
    lengths: tuple[float, ...]
    rounding: float
    concentration: float
    doubt: str

    def interval(self) -> tuple[float, float]:
        """Both ends of the interval."""
        return self.lower, self.upper

    @property
    def square(self) -> tuple[float, float, float]:
        """`‖A‖_F²` with the ends of its interval: value, lower, upper."""
        return self.value * self.value, self.lower * self.lower, self.upper * self.upper


@final
@dataclass(frozen=True, eq=False)
class Frobenius(Deflating[FrobeniusEstimate]):
    """Estimator of `‖A‖_F` from the mean of `‖A v‖²`, which is Hutchinson's estimator for `tr(A²)`.

    *Variance* of one `‖A v‖²`: `2 ‖A²‖_F²` with Gaussian probes, `2 (‖A²‖_F² − Σ (A²)_ii²)` with signs.

    *Deflation.* With `P = I − X Xᵀ`, `‖A‖_F² = ‖Xᵀ A X‖_F² + 2 ‖P A X‖_F² + ‖P A P‖_F²`: the blocks beside the diagonal
    count twice, and both follow from `A X`, so that they are exact even where X is no invariant space. Only the last
    part is sampled.

    *Interval.* A mean of squares is positive and skewed to the right: Student's interval is laid around its logarithm.
    At nominal 95 % it covers 92 % for a single eigenvalue with 10 probes, where the plain one covers 86 %, 94 % with 64;
    for decaying spectra 92 to 94 % with 10 and 94 to 95 % with 64; for spectra without outliers 95 %. Squares are
    dominated sooner than the matrix itself, so that `doubt` looks at the root of the concentration.

    Attributes:
        probes: number of probes, at least 2.
        confidence: nominal coverage.
        block: probes that share a pass over the data; it does not change which probes are drawn.
        distribution: distribution of the probes.
        directions: orthonormal columns to deflate, shape `(n, d)`; None for none.

    Raises:
        UsageError: a setting has no meaning, or the directions do not fit or are not orthonormal.

    >>> from isoflat.core.rng import stream
    >>> from isoflat.linalg.operator import Dense
    >>> Frobenius(probes=4)(Dense(torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))), stream(0)).value
    5.0
    """

    label: ClassVar[str] = "Frobenius"

    probes: int = 64
    confidence: float = 0.95
    block: int = 8
    distribution: Distribution = Distribution.RADEMACHER

    def __post_init__(self) -> None:
        """Refuse settings without meaning."""
        check(self.probes, self.confidence, self.block)

    def steps(self, domain: Domain, stream: torch.Generator) -> Steps[FrobeniusEstimate]:
        """Multiply the directions for the exact blocks, then take the lengths of projected products."""
        rows = self.basis(domain)
        blocks: list[float] = []
        probes = ProjectedProbes(rows, domain, self.distribution, stream)

        def split(_: Tensor, product: Tensor) -> None:
            rest = product.clone()
            inside = space.norm(remove(rows, rest))
            blocks.extend((inside, math.sqrt(2) * space.norm(rest)))

        used = yield from ask(along(rows), split, len(rows), self.block, domain, "norm: direction")
        used += yield from ask(probes.draw, probes.take, self.probes, self.block, domain, "norm: probe")
        return self._result(math.hypot(*blocks), probes.forms, unit(domain.dtype, domain.n), used)

    def _result(self, exact: float, forms: QuadraticForms, eps: float, used: int) -> FrobeniusEstimate:
        m = len(forms.norms)
        sampled = math.hypot(*forms.norms) / math.sqrt(m)
        # The squares in units of their mean: their relative deviation is the deviation of the logarithm, to first order.
        squares = [(length / sampled) ** 2 for length in forms.norms] if sampled else [0.0] * m
        share = deviation(squares) / math.sqrt(m)
        value = math.hypot(exact, sampled)
        error = share / 2 * sampled * (sampled / value) if value else 0.0
        rounding = eps * value
        t = quantile(self.confidence, m - 1)
        stretch = math.exp(min(t * share / 2, 300.0))
        return FrobeniusEstimate(
            value=value,
            lower=max(math.hypot(exact, sampled / stretch) - rounding, 0.0),
            upper=math.hypot(exact, sampled * stretch) + rounding,
            standard_error=error,
            confidence=self.confidence,
            products=used,
            exact=exact,
            lengths=tuple(forms.norms),
            rounding=rounding,
            concentration=forms.concentration,
            doubt=doubt(m, math.sqrt(forms.concentration), t * error <= rounding),
        )
