"""Bounds on eigenvalue counts from the average spectral distribution of random probes, whose exact law is inverted.

Let g_1 … g_m be standard normal in ℝᴺ and `B(x) = Σ_p ‖1[A ≤ x] g_p‖² / Σ_p ‖g_p‖²`: the average of the distributions of
the directions `v_p = g_p/‖g_p‖`, which are uniform on the sphere, each with share `‖g_p‖² / Σ ‖g_p‖²`. Where j of the N
eigenvalues are at most x, B(x) is a ratio of χ² variables, `Beta(jm/2, (N − j)m/2)`, and `B_1 ≤ B_2 ≤ …` for all j
together are the partial sums of a Dirichlet vector with N entries m/2: the law knows neither the eigenvalues nor their
multiplicities. (The average with equal shares has nearly the same variance, `2 φ(1 − φ)/(m(N + 2))` at `φ = j/N`
instead of `2 φ(1 − φ)/(mN + 2)`, but no such law.)

*Everywhere at once.* Where Nm is even, the partial sums are order statistics: a χ² variable with two degrees of freedom is
exponential, so that every second partial sum of the Nm squares is one of `Nm/2 − 1` ordered uniform variables. By the
inequality of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, `|B_j − j/N| ≤ t` for all j but with probability
`2 exp(−(Nm − 2) t²)`; where m is odd, partial sums between two of these add `1/(Nm)`. The bound of Chen, Trogdon and
Ubaru (2021, arXiv 2105.06595), which adds the failures of N sub-Gaussian variables with the proxy variance of Marchal and
Arbel (2017), is `2N exp(−(Nm + 2) t²)`; it is used where Nm is odd. Both need `Nm t²` of a few units: at N = 10⁶ one
probe tells shares to 0.002.

*Near the ends* an error of a share is too much: ten of 10⁶ eigenvalues are no share at all. There the quantiles of the Beta
laws are used, with failure probabilities `∝ 1/(r(r + 1))`, r the distance from the nearer end, which have a finite sum
whatever N is. In front of an end `j ± O(√(j/m))` eigenvalues are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]


def uniform_error(size: int, probes: int, failure: float) -> float:
    """The t with `P(|B_j − j/N| ≤ t for all j) ≥ 1 − failure`.

    Args:
        size: number N of eigenvalues.
        probes: number m of probes.
        failure: probability that the bound does not hold.

    >>> round(uniform_error(10**6, 1, 0.05), 4), round(uniform_error(1001, 1, 0.05), 3)
    (0.0019, 0.103)
    """
    units = size * probes
    if units <= 2:
        return 1.0
    if units % 2:
        return math.sqrt(math.log(2 * size / failure) / (units + 2))
    return math.sqrt(math.log(2 / failure) / (units - 2)) + (1 / units if probes % 2 else 0.0)


def counted(lower: Reals, upper: Reals, size: int, probes: int, failure: float) -> tuple[Whole, Whole]:
    """Bounds on the number of eigenvalues below given points, from bounds on the average distribution B of the probes.

    Args:
        lower: bounds on B from below, shape `(g,)`.
        upper: bounds on B from above, shape `(g,)`, at the same places or at others.
        size: number N of eigenvalues.
        probes: number m of probes.
        failure: probability that any returned number is wrong.

    Returns:
        The least number of eigenvalues at each place of `lower`, and the largest at each place of `upper`.

    >>> least, most = counted(np.array([0.5]), np.array([0.5]), 10**6, 4, 0.05)
    >>> int(least[0]), int(most[0])
    (498954, 501046)
    """
    error = uniform_error(size, probes, failure / 2)
    least = np.ceil(size * (lower - error)).clip(0, size).astype(np.int64)
    most = np.floor(size * (upper + error)).clip(0, size).astype(np.int64)

    near_ends = _NearEnds(size, probes, failure / 2)
    fewest = _first(lambda j: near_ends.may_carry_at_least(j, lower), len(lower), size)
    rest = _first(lambda j: near_ends.may_carry_at_most(size - j, upper), len(upper), size)
    return np.maximum(least, fewest), np.minimum(most, size - rest)


@final
@dataclass(frozen=True)
class _NearEnds:
    """The quantiles of the Beta laws, each of N − 1 with a failure probability of its own.

    Both sides of both ends have a quarter of the failure probability, and `Σ_r 1/(r(r + 1)) = 1`.
    """

    size: int
    probes: int
    failure: float

    def may_carry_at_least(self, j: Whole, mass: Reals) -> Flags:
        """Test of whether j eigenvalues may carry at least this mass."""
        from scipy.special import betaincc

        few, inside = self._law(j)
        much = betaincc(*few, mass) >= self._tolerated(j)
        return np.where(inside, much, (j == self.size) | (mass <= 0))

    def may_carry_at_most(self, j: Whole, mass: Reals) -> Flags:
        """Test of whether j eigenvalues may carry at most this mass."""
        from scipy.special import betainc

        few, inside = self._law(j)
        little = betainc(*few, mass) >= self._tolerated(j)
        return np.where(inside, little, (j == 0) | (mass >= 1))

    def _tolerated(self, j: Whole) -> Reals:
        near = np.minimum(j, self.size - j).clip(1).astype(np.float64)
        return self.failure / 4 / (near * (near + 1))

    def _law(self, j: Whole) -> tuple[tuple[Reals, Reals], Flags]:
        """Both parameters, and where there is a law; for none and for all there is none, the mass is 0 or 1."""
        inside = (j > 0) & (j < self.size)
        few = np.where(inside, j, 1).astype(np.float64)
        many = np.where(inside, self.size - j, 1).astype(np.float64)
        return (few * self.probes / 2, many * self.probes / 2), inside


def _first(possible: Callable[[Whole], Flags], count: int, size: int) -> Whole:
    """The first j from 0 to N from which on it is possible, by bisection in all places together."""
    low, high = np.zeros(count, dtype=np.int64), np.full(count, size, dtype=np.int64)
    while bool((low < high).any()):
        middle = (low + high) // 2
        found = possible(middle) | (low == high)
        low, high = np.where(found, low, middle + 1), np.where(found, middle, high)
    return low
