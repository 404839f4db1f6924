"""A spectrum that is known to lie between two others, and what that says about sums over its eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from isoflat.core.errors import NonFinite, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.plain import attributes

Reals = NDArray[np.float64]


@final
@dataclass(frozen=True)
class Atoms:
    """Eigenvalues with multiplicities.

    Attributes:
        points: eigenvalues, ascending.
        counts: multiplicity of each, positive.

    >>> Atoms((0.0, 2.0), (3, 1)).total(lambda x: 2 * x)
    4.0
    """

    points: tuple[float, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(points: Reals, counts: NDArray[np.int64]) -> Atoms:
        """Atoms from points in any order; equal points are joined, empty ones left out."""
        places, which = np.unique(points[counts > 0], return_inverse=True)
        joined = np.zeros(len(places), dtype=np.int64)
        np.add.at(joined, which, counts[counts > 0])
        return Atoms(tuple(places.tolist()), tuple(joined.tolist()))

    @property
    def n(self) -> int:
        """Number of eigenvalues."""
        return sum(self.counts)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Number of eigenvalues at each point or before it."""
        return np.cumsum(self.counts, dtype=np.int64)

    def below(self, x: float) -> int:
        """Number of eigenvalues that are at most x."""
        place = int(np.searchsorted(self.points, x, side="right"))
        return int(self.ends[place - 1]) if place else 0

    def at(self, index: int) -> float:
        """The eigenvalue with this number; the smallest has number 1."""
        return self.points[int(np.searchsorted(self.ends, index))]

    def total(self, function: Callable[[Reals], Reals]) -> float:
        """`Σ f(λ)`."""
        return math.fsum(function(np.array(self.points)) * np.array(self.counts, dtype=np.float64))


@final
@dataclass(frozen=True)
class Quadrature:
    """Gauss quadrature of a spectrum from one random probe v: `Σ_j w_j f(θ_j) = vᵀ f(B) v` for polynomials f up to a degree.

    Attributes:
        nodes: nodes θ, ascending.
        weights: weights w, non-negative, with sum 1.
        square: squared length `‖g‖²` of the Gaussian vector g whose direction v is: the probe's share in an average.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    square: float


@final
@dataclass(frozen=True)
class Outlier:
    """An eigenvalue that was taken out before probes were drawn.

    Attributes:
        value: Rayleigh quotient of a fresh product.
        residual: `‖A x − value·x‖` from the same product.
    """

    value: float
    residual: float


@final
@dataclass(frozen=True)
class Density:
    """The spectrum of a symmetric matrix, seen by a few random probes, between two spectra that enclose it.

    With probability `confidence` over the probes, *all* of this holds at once: the i-th eigenvalue lies between the i-th
    of `low` and the i-th of `high`, for every i. Whatever follows from it holds on the same event: the intervals of
    the distribution function, of quantiles, of counts, of ranks, and the distance of the estimate from the truth.

    Attributes:
        n: dimension.
        probes: quadrature of each probe; the estimate is their average.
        outliers: eigenvalues that were taken out beforehand, ascending; each is one of the n.
        low: spectrum that lies below the true one, eigenvalue by eigenvalue.
        high: spectrum that lies above it.
        confidence: probability that all eigenvalues lie between `low` and `high`.
        slack: largest shift of an eigenvalue by rounding and by residuals of the outliers; `low` and `high` include it.
        products: number of products used.
        exact: True where it was computed from the whole matrix, so that nothing is random.
        reached: True where all probes and steps were taken that were asked for.
        stopped: reason for the end of the run, in words.

    >>> nodes = Quadrature((0.0, 1.0), (0.5, 0.5), square=2.0)
    >>> density = Density(2, (nodes,), (), Atoms((0.0,), (2,)), Atoms((0.0, 1.0), (1, 1)), 0.95, 0.0, 2, False, True, "")
    >>> str(density.count(0.5)), density.quantile(1.0).upper, density.wasserstein
    ('1(1)', 1.0, 0.5)
    """

    n: int
    probes: tuple[Quadrature, ...]
    outliers: tuple[Outlier, ...]
    low: Atoms
    high: Atoms
    confidence: float
    slack: float
    products: int
    exact: bool
    reached: bool
    stopped: str

    def __post_init__(self) -> None:
        """Refuse what is no spectrum of n eigenvalues."""
        if not self.low.n == self.high.n == self.n or len(self.outliers) > self.n:
            raise UsageError(f"expected {self.n} eigenvalues, got bounds for {self.low.n} and {self.high.n}")
        ends = (*self.low.points, *self.high.points, *(outlier.value for outlier in self.outliers))
        if not all(map(math.isfinite, ends)):
            raise NonFinite("eigenvalues must be finite")

    @cached_property
    def estimate(self) -> tuple[Reals, Reals]:
        """Points, ascending, and their masses with sum 1: the outliers, and what the probes saw on average."""
        bulk = (self.n - len(self.outliers)) / self.n
        squares = math.fsum(probe.square for probe in self.probes)
        points = [outlier.value for outlier in self.outliers]
        masses = [1 / self.n] * len(points)
        for probe in self.probes:
            points += probe.nodes
            masses += [bulk * probe.square / squares * weight for weight in probe.weights]
        order = np.argsort(points, kind="stable")
        return np.array(points)[order], np.array(masses)[order]

    @property
    def largest(self) -> float:
        """The largest magnitude that was seen."""
        points = self.estimate[0]
        return float(max(abs(points[0]), abs(points[-1])))

    def below(self, x: float) -> Estimate:
        """The distribution function: the share of eigenvalues that are at most x."""
        points, masses = self.estimate
        seen = math.fsum(masses[points <= x])
        return self._enclosed(seen, self.high.below(x) / self.n, self.low.below(x) / self.n)

    def count(self, threshold: float) -> Estimate:
        """Number of eigenvalues above a threshold."""
        points, masses = self.estimate
        seen = self.n * math.fsum(masses[points > threshold])
        return self._enclosed(seen, self.n - self.low.below(threshold), self.n - self.high.below(threshold))

    def between(self, lower: float, upper: float) -> Estimate:
        """The share of eigenvalues in the closed interval from `lower` to `upper`."""
        before = float(np.nextafter(lower, -math.inf))
        points, masses = self.estimate
        seen = math.fsum(masses[(points >= lower) & (points <= upper)])
        least = max(self.high.below(upper) - self.low.below(before), 0)
        most = max(self.low.below(upper) - self.high.below(before), 0)
        return self._enclosed(seen, least / self.n, most / self.n)

    def quantile(self, share: float) -> Estimate:
        """The smallest eigenvalue with at least this share of all at or below it; 0 for the smallest of all.

        Raises:
            UsageError: the share is not between 0 and 1.
        """
        if not 0 <= share <= 1:
            raise UsageError(f"a share of eigenvalues lies between 0 and 1, got {share}")
        points, masses = self.estimate
        index = max(math.ceil(share * self.n), 1)
        # The middle of the eigenvalue's own mass: rounding of the sum cannot put it on the wrong side.
        seen = points[min(int(np.searchsorted(np.cumsum(masses), (index - 0.5) / self.n)), len(points) - 1)]
        return self._enclosed(float(seen), self.low.at(index), self.high.at(index))

    @property
    def wasserstein(self) -> float:
        """A bound on `∫ |F̂ − F|`, F̂ the estimate's distribution function: by how much eigenvalues are off on average."""
        points, masses = self.estimate
        cuts = np.unique(np.concatenate([points, self.low.points, self.high.points]))
        seen, least, most = (
            np.concatenate([[0.0], np.cumsum(share)])[np.searchsorted(places, cuts[:-1], side="right")]
            for places, share in (
                (points, masses),
                (self.high.points, np.array(self.high.counts) / self.n),
                (self.low.points, np.array(self.low.counts) / self.n),
            )
        )
        return math.fsum(np.maximum(most - seen, seen - least) * np.diff(cuts))

    def moment(self, power: int) -> float:
        """`tr(Aᵖ)/n`, as the probes saw it."""
        points, masses = self.estimate
        return math.fsum(masses * points**power)

    def moment_error(self, power: int) -> float:
        """Standard error of a moment, from how far the probes differ.

        Raises:
            UsageError: there are fewer than two probes to tell it from.
        """
        if self.exact:
            return 0.0
        count = len(self.probes)
        if count < 2:
            raise UsageError(f"a standard error needs at least 2 probes, got {count}")
        squares = np.array([probe.square for probe in self.probes])
        seen = [math.fsum(np.array(probe.weights) * np.array(probe.nodes) ** power) for probe in self.probes]
        shares = squares / squares.sum()
        centre = float(shares @ seen)
        spread = math.fsum((shares * (np.array(seen) - centre)) ** 2) * count / (count - 1)
        return (self.n - len(self.outliers)) / self.n * math.sqrt(spread)

    def soft_rank(self, mu: float) -> Estimate:
        """`Σ λ/(λ + μ)` over the positive eigenvalues (MacKay 1992): how many of them μ does not drown.

        Raises:
            UsageError: μ is not positive.
        """
        if not mu > 0:
            raise UsageError(f"μ must be positive, got {mu}")
        points, masses = self.estimate

        def share(x: Reals) -> Reals:
            positive = np.maximum(x / mu, 0.0)
            return positive / (1 + positive)

        seen = self.n * math.fsum(masses * share(points))
        return self._enclosed(seen, self.low.total(share), self.high.total(share))

    def participation(self) -> Estimate:
        """`(tr A)² / ‖A‖_F²`: r for r equal eigenvalues and zeros; zero for the zero matrix."""
        unit = max(abs(self.low.points[0]), abs(self.high.points[-1]), self.largest)
        if unit == 0:
            return self._enclosed(0.0, 0.0, 0.0)
        points, masses = self.estimate
        points = points / unit
        square = math.fsum(masses * points**2)
        seen = self.n * math.fsum(masses * points) ** 2 / square if square else 0.0
        # Runs of eigenvalues with one lower and one upper end each.
        cuts = np.unique(np.concatenate([self.low.ends, self.high.ends]))
        sizes = np.diff(cuts, prepend=0)
        lower = np.array(self.low.points)[np.searchsorted(self.low.ends, cuts)] / unit
        upper = np.array(self.high.points)[np.searchsorted(self.high.ends, cuts)] / unit
        first, last = math.fsum(sizes * lower), math.fsum(sizes * upper)
        furthest = math.fsum(sizes * np.maximum(lower**2, upper**2))
        nearest = math.fsum(sizes * np.where((lower < 0) & (upper > 0), 0.0, np.minimum(lower**2, upper**2)))
        least = 0.0 if first <= 0 <= last else min(first**2, last**2) / furthest
        most = min(max(first**2, last**2) / nearest, float(self.n)) if nearest else float(self.n)
        return self._enclosed(seen, min(least, float(self.n)), most)

    def _enclosed(self, value: float, lower: float, upper: float) -> Estimate:
        """An estimate with its interval; a value outside is moved to the nearest end."""
        return Estimate(
            value=min(max(value, float(lower)), float(upper)),
            lower=float(lower),
            upper=float(upper),
            confidence=self.confidence,
            kind=Kind.ENCLOSURE,
            converged=self.reached,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return attributes(self, *_PLAIN, "probes", "outliers", "low", "high")

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Density:
        """Inverse of `to_dict`; floats return bit for bit."""
        low, high = (Atoms(tuple(data[end]["points"]), tuple(data[end]["counts"])) for end in ("low", "high"))
        return Density(
            probes=tuple(Quadrature(tuple(p["nodes"]), tuple(p["weights"]), p["square"]) for p in data["probes"]),
            outliers=tuple(Outlier(**outlier) for outlier in data["outliers"]),
            low=low,
            high=high,
            **{key: data[key] for key in _PLAIN},
        )


_PLAIN = ("n", "confidence", "slack", "products", "exact", "reached", "stopped")
