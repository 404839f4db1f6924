"""A number with its interval, its cost and whether it converged."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, final

from isoflat.core import render
from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.plain import attributes, json_numbers


class Kind(StrEnum):
    """Meaning of the interval `[lower, upper]` of an `Estimate`."""

    ENCLOSURE = "enclosure"
    """Contains the exact number for the given weights and data, with the stated confidence."""
    STANDARD_ERROR = "standard_error"
    """Student t-interval of a stochastic estimator, with the stated confidence."""
    EXACT = "exact"
    """A closed form or a finite sum, without solver or sample: the interval allows for rounding, which is not measured."""
    UNCERTIFIED = "uncertified"
    """A lower bound and a residual only; nothing is claimed about the upper end."""


@final
@dataclass(frozen=True)
class Cost:
    """Cost of an estimate.

    Attributes:
        products: Hessian-vector products, each over all the data.
        gradient_passes: the whole cost in units of one gradient over the same data, timed in the same run.
        seconds: wall-clock time.
        peak_memory: high-water mark of the process (or of the accelerator) in bytes when the estimate was ready.
    """

    products: int = 0
    gradient_passes: float = 0.0
    seconds: float = 0.0
    peak_memory: int = 0


@final
@dataclass(frozen=True)
class Estimate:
    """A value with the interval it is known to lie in.

    `converged` means that the relative width `(upper - lower) / |value|` reached the requested `rtol`; for
    `Kind.UNCERTIFIED`, that the true residual did. The width is the numerical error *at fixed weights and data*:
    variation over training seeds or data subsets is never mixed in.

    Attributes:
        value: the number itself.
        lower: lower end of the interval.
        upper: upper end of the interval; infinite when uncertified.
        confidence: probability, over the solver's random start, that the interval contains the exact number.
        kind: meaning of the interval.
        converged: whether the requested tolerance was reached.
        cost: products, gradient passes, seconds, memory.
        residual: `‖A x − ρ x‖` of an eigenvalue, from a product of its own, never from the recurrence; else None.
        standard_error: standard error of the mean of a stochastic estimate; else None.
        notes: remarks and warnings for the reader, in words.
        samples: one value per random probe, in order, of which `value` is the mean; empty for everything else. Two
            networks measured with the same probes are compared probe by probe.

    >>> print(Estimate(0.8731, 0.8695, 0.8770, confidence=0.999999, kind=Kind.ENCLOSURE, converged=True))
    0.873(4)
    """

    value: float
    lower: float
    upper: float
    confidence: float
    kind: Kind
    converged: bool
    cost: Cost = field(default_factory=Cost)
    residual: float | None = None
    standard_error: float | None = None
    notes: tuple[str, ...] = ()
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse NaN and intervals that do not contain their value."""
        if math.isnan(self.value) or math.isnan(self.lower) or math.isnan(self.upper):
            raise NonFinite(f"an estimate must be a number, got value {self.value} in [{self.lower}, {self.upper}]")
        if not all(map(math.isfinite, self.samples)):
            raise NonFinite("the values of an estimate's probes must be finite")
        if not self.lower <= self.value <= self.upper:
            raise UsageError(f"value {self.value!r} lies outside its interval [{self.lower!r}, {self.upper!r}]")

    @staticmethod
    def exact(value: float, *notes: str) -> Estimate:
        """A number that nothing but rounding makes uncertain (`allowing`).

        >>> print(Estimate.exact(0.25))
        0.25
        """
        return Estimate(value, value, value, 1.0, Kind.EXACT, True, notes=notes)

    def allowing(self, rounding: float) -> Estimate:
        """Give the estimate an interval that allows for a relative rounding, where it has none yet.

        >>> print(Estimate.exact(0.25).allowing(1e-5))
        0.250000(3)
        """
        if self.lower < self.upper:
            return self
        slack = rounding * abs(self.value)
        return replace(self, lower=self.value - slack, upper=self.value + slack)

    @property
    def relative_width(self) -> float:
        """`(upper − lower) / |value|`; zero for an exact zero, infinite when uncertified."""
        width = self.upper - self.lower
        return width / abs(self.value) if self.value else (0.0 if width == 0 else math.inf)

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times the number (`factor` > 0)."""
        if not factor > 0:
            raise UsageError(f"an estimate can be scaled by a positive factor only, got {factor}")
        return replace(
            self,
            value=self.value * factor,
            lower=self.lower * factor,
            upper=self.upper * factor,
            residual=None if self.residual is None else self.residual * factor,
            standard_error=None if self.standard_error is None else self.standard_error * factor,
            samples=tuple(sample * factor for sample in self.samples),
        )

    def with_notes(self, *notes: str) -> Estimate:
        """The same estimate with further notes, each kept once and in order."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def __str__(self) -> str:
        """Concise notation: the digit in brackets is the uncertainty of the last digit shown (`core.render`)."""
        if self.kind is Kind.UNCERTIFIED:
            return f"{self.value:.6g} (uncertified)"
        return render.concise(self.value, self.lower, self.upper)

    def __float__(self) -> float:
        """The value.

        >>> float(Estimate(0.8731, 0.8695, 0.8770, 0.999, Kind.ENCLOSURE, True))
        0.8731
        """
        return self.value

    def __format__(self, spec: str) -> str:
        """The value in a format of floats; without a format, as `str`.

        >>> est = Estimate(0.8731, 0.8695, 0.8770, 0.999, Kind.ENCLOSURE, True)
        >>> f"{est} {est:.2f} {est:.1e}"
        '0.873(4) 0.87 8.7e-01'
        """
        return format(self.value, spec) if spec else str(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; infinities become strings."""
        return {**attributes(self, *_KEYS), **json_numbers(self, "value", "lower", "upper", "relative_width")}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Estimate:
        """Inverse of `to_dict`; floats return bit for bit."""
        return Estimate(
            value=float(data["value"]),
            lower=float(data["lower"]),
            upper=float(data["upper"]),
            confidence=data["confidence"],
            kind=Kind(data["kind"]),
            converged=data["converged"],
            cost=Cost(**data["cost"]),
            residual=data["residual"],
            standard_error=data["standard_error"],
            notes=tuple(data["notes"]),
            samples=tuple(data.get("samples", ())),  # records of the same schema from before there were any
        )


def interval(estimate: Estimate) -> str:
    """The interval of an estimate in brackets, rounded outwards; its residual where it has no upper end.

    >>> interval(Estimate(2.5, 2.5, 2.5013, 0.999, Kind.ENCLOSURE, True))
    '[2.50000, 2.50130]'
    """
    if estimate.kind is Kind.UNCERTIFIED:
        return f"residual {estimate.residual:.1e}" if estimate.residual is not None else "none"
    return render.bounds(estimate.lower, estimate.upper)


def value_over_interval(estimate: Estimate) -> str:
    """A value, and on the line below its interval, for a cell of a table."""
    return f"{estimate}\n{interval(estimate)}"


_KEYS = (
    "value", "lower", "upper", "confidence", "kind", "converged", "relative_width", "residual", "standard_error", "cost",
    "notes", "samples",
)  # fmt: skip
