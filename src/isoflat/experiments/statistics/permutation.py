"""Permutation test of Kendall's correlation, exact where that can be done."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.stats import kendalltau, permutation_test, rankdata

from isoflat.core.errors import UsageError
from isoflat.experiments.statistics.sample import OutcomeSample, generator_of, signs


@final
@dataclass(frozen=True)
class PermutationTest:
    """Outcome of a permutation test of a rank correlation.

    Attributes:
        p: two-sided p-value: twice the smaller tail.
        floor: the smallest p-value that is possible with so many networks, these ties and so many draws.
        exact: whether all permutations were counted; otherwise random ones and the sample itself were.
        draws: number of random permutations; 0 if exact.
    """

    p: float
    floor: float
    exact: bool
    draws: int

    @property
    def bound_by_draws(self) -> bool:
        """True if more draws would make a smaller p-value possible."""
        return not self.exact and math.isclose(self.floor, 2 / (self.draws + 1))


def permutation(sample: OutcomeSample, seed: int = 0, draws: int = 9999) -> PermutationTest:
    """Test of τ under the hypothesis that outcomes are dealt out to values at random.

    Without ties the distribution of τ over all permutations is known by recursion. With ties all permutations are
    visited if there are not more than the draws, and random ones otherwise. A relation that only follows a
    hyper-parameter is a relation for this test: see `granulated` and `robust`.

    Args:
        sample: at least three networks.
        seed: seed of the draws.
        draws: number of random permutations.

    Raises:
        UsageError: there is no draw.

    >>> permutation(OutcomeSample((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3.0, 4.0))).p
    0.08333333333333333
    """
    if draws < 1:
        raise UsageError(f"a permutation test needs at least one draw, got {draws}")
    sample = sample.ordered
    networks, outcome_signs = len(sample), signs(sample.outcomes)
    if min(len(set(sample.values)), len(set(sample.outcomes))) == 1:
        return PermutationTest(1.0, 1.0, True, 0)
    floor = _floor(sample.values, sample.outcomes)
    if len(set(sample.values)) == len(set(sample.outcomes)) == networks:
        p = kendalltau(sample.values, sample.outcomes, method="exact").pvalue
        return PermutationTest(float(p), floor, True, 0)

    def score(permuted: np.ndarray, axis: int) -> np.ndarray:
        above = permuted[..., :, None] > permuted[..., None, :]
        return above.reshape(*above.shape[:-2], -1).astype(float) @ outcome_signs.ravel().astype(float)

    p = permutation_test(
        (rankdata(sample.values, method="dense"),),
        score,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _CELLS // networks**2),
        random_state=generator_of(seed, "permutation"),
    ).pvalue
    if math.factorial(networks) <= draws:
        return PermutationTest(float(p), floor, True, 0)
    floor = max(floor, min(1.0, 2 / (draws + 1)))
    return PermutationTest(max(float(p), floor), floor, False, draws)  # random draws can fall short of what is possible


_CELLS = 1_000_000
"""Number of floats held at once while permuting."""


def _floor(values: tuple[float, ...], outcomes: tuple[float, ...]) -> float:
    """Smallest two-sided p-value: twice the chance of the sorted arrangement or of the reversed one, given the ties."""
    rising, both = sorted(values), sorted(outcomes)
    least = min(_chance(rising, both), _chance(rising[::-1], both))
    return min(1.0, 2 * math.exp(least))


def _chance(values: list[float], outcomes: list[float]) -> float:
    """Logarithm of the chance that a random permutation gives this table of values against outcomes."""
    arranged = [*Counter(values).values(), *Counter(outcomes).values()]
    alike = Counter(zip(values, outcomes, strict=True)).values()
    ways = math.fsum(math.lgamma(count + 1) for count in arranged)
    return ways - math.lgamma(len(values) + 1) - math.fsum(math.lgamma(count + 1) for count in alike)
