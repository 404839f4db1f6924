"""Partial rank correlation: the relation that is left when the training loss is taken into account."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.stats import permutation_test, rankdata

from isoflat.core.errors import UsageError
from isoflat.experiments.statistics.sample import OutcomeSample, generator_of


@final
@dataclass(frozen=True)
class PartialCorrelation:
    """Spearman's correlation of measure and outcome given the training loss.

    Attributes:
        rho: partial correlation of the ranks; None if the loss's ranks leave nothing of one of the two.
        p: two-sided p-value, by permuting what the loss leaves of the outcome; 1 if there is nothing left.
        floor: the smallest p-value that is possible with so many networks and draws.
        draws: number of permutations that were visited.
    """

    rho: float | None
    p: float
    floor: float
    draws: int


def partial(sample: OutcomeSample, seed: int = 0, draws: int = 9999) -> PartialCorrelation:
    """Partial Spearman correlation given the training loss, tested by Freedman and Lane (1983).

    Spearman and not Kendall: if measure and outcome depend on the loss only (as a Gaussian copula with correlations
    0.8), the partial Spearman coefficient is 0.01 but the partial Kendall coefficient 0.14, so that the latter finds a
    relation where there is none. What is taken away is linear in the loss's rank; a dependence on the loss that is not
    monotone remains. The test permutes residuals, and is exact in the limit of many networks.

    Args:
        sample: networks with training losses.
        seed: seed of the permutations.
        draws: number of permutations.

    Raises:
        UsageError: the training losses are not known, or there is no draw.

    >>> partial(OutcomeSample((1.0, 2.0, 3.0, 4.0), (2.0, 1.0, 4.0, 3.0), losses=(1.0, 1.0, 2.0, 2.0))).rho
    -1.0
    """
    if sample.losses is None:
        raise UsageError(
            "a partial correlation given the training loss needs the training losses: give OutcomeSample.losses"
        )
    if draws < 1:
        raise UsageError(f"a permutation test needs at least one draw, got {draws}")
    sample = sample.ordered
    loss = _centred(sample.losses or ())
    value, outcome = (_residual(_centred(numbers), loss) for numbers in (sample.values, sample.outcomes))
    if not value.any() or not outcome.any():
        return PartialCorrelation(None, 1.0, 1.0, 0)
    toward = value / np.linalg.norm(value)
    away = loss / (np.linalg.norm(loss) or 1.0)

    def statistic(permuted: np.ndarray, axis: int) -> np.ndarray:
        rest = permuted - (permuted @ away)[..., None] * away
        size = np.linalg.norm(rest, axis=axis)
        some = size > len(sample) * np.finfo(float).eps  # of a permutation of unit length
        return np.divide(permuted @ toward, size, out=np.zeros(size.shape), where=some)

    test = permutation_test(
        (outcome / np.linalg.norm(outcome),),
        statistic,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=draws,
        batch=max(1, _CELLS // len(sample)),
        random_state=generator_of(seed, "partial"),
    )
    visited = len(test.null_distribution)
    floor = min(1.0, 2 / (visited if visited == math.factorial(len(sample)) else visited + 1))
    return PartialCorrelation(float(np.clip(test.statistic, -1, 1)), float(test.pvalue), floor, visited)


_CELLS = 1_000_000
"""Number of floats held at once while permuting."""


def _centred(numbers: tuple[float, ...]) -> np.ndarray:
    """Twice the ranks minus their mean: integers, also with ties."""
    return (2 * rankdata(numbers)).astype(np.int64) - (len(numbers) + 1)


def _residual(ranks: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The remainder after the loss is taken out, times a whole number, so that nothing left is exactly zero."""
    square = int(loss @ loss)
    return ranks * square - loss * int(ranks @ loss) if square else ranks
