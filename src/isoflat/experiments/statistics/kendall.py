"""Kendall's rank correlation with an interval by resampling networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.stats import bootstrap, kendalltau

from isoflat.core.errors import UsageError
from isoflat.experiments.statistics.sample import OutcomeSample, generator_of, signs


@final
@dataclass(frozen=True)
class Kendall:
    """Kendall's τ-b and an interval for it.

    Attributes:
        tau: coefficient between -1 and 1; None if all values or all outcomes are tied.
        lower: lower end of the interval.
        upper: upper end of the interval.
        confidence: confidence of the interval.
        draws: number of resamples.
        degenerate: number of resamples in which all values or all outcomes were tied. They could have had any τ, and so widen
            the interval on both sides: they count as -1 for its lower end and as 1 for its upper.
        unanimous: whether all pairs agree (τ = ±1). So would every resample, which says nothing about the next network:
            the end towards zero is then the level at which that many disjoint pairs would all agree by chance.
    """

    tau: float | None
    lower: float
    upper: float
    confidence: float
    draws: int
    degenerate: int
    unanimous: bool


def kendall(sample: OutcomeSample, seed: int = 0, draws: int = 1999, confidence: float = 0.95) -> Kendall:
    """τ-b with a percentile bootstrap interval over networks.

    A network drawn twice is tied with itself in both numbers, and τ-b leaves such pairs out, so that resamples are not
    biased towards zero. The percentile interval was preferred to BCa: in simulations (8 to 40 networks from Gaussian
    copulas) both covered at least at the nominal rate, and it was the shorter. Both would shrink to a point where all
    pairs agree; see `Kendall.unanimous`.

    Args:
        sample: at least three networks, which are taken to be drawn independently.
        seed: seed of the resamples.
        draws: number of resamples.
        confidence: confidence of the interval.

    Raises:
        UsageError: the confidence or the number of draws has no meaning.

    >>> kendall(OutcomeSample((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 4.0, 3.0))).tau
    0.666...
    """
    if not 0 < confidence < 1 or draws < 1:
        raise UsageError(f"expected a confidence between 0 and 1 and at least one draw, got {confidence} and {draws}")
    sample = sample.ordered
    networks = len(sample)
    distinct = min(len(set(sample.values)), len(set(sample.outcomes)))
    if distinct == 1:
        return Kendall(None, -1.0, 1.0, confidence, draws, draws, False)
    tau = float(kendalltau(sample.values, sample.outcomes).statistic)
    value_signs, outcome_signs = signs(sample.values), signs(sample.outcomes)
    forms = [form.astype(float) for form in (value_signs * outcome_signs, abs(value_signs), abs(outcome_signs))]

    def resampled(drawn: np.ndarray, axis: int) -> np.ndarray:
        counts = (drawn[..., None] == np.arange(networks)).sum(axis=axis - 1).astype(float)
        score, value_pairs, outcome_pairs = (((counts @ form) * counts).sum(axis=-1) for form in forms)
        size = np.sqrt(value_pairs) * np.sqrt(outcome_pairs)
        taus = np.clip(np.divide(score, size, out=np.zeros(size.shape), where=size > 0), -1, 1)
        return np.where(size > 0, taus, _UNDEFINED)

    taus = bootstrap(
        (np.arange(networks),),
        resampled,
        n_resamples=draws,
        batch=max(1, _CELLS // networks**2),
        vectorized=True,
        method="percentile",
        random_state=generator_of(seed, "kendall"),
    ).bootstrap_distribution
    degenerate, tail = taus == _UNDEFINED, (1 - confidence) / 2
    lower = float(np.quantile(np.where(degenerate, -1.0, taus), tail))
    upper = float(np.quantile(np.where(degenerate, 1.0, taus), 1 - tail))
    unanimous = bool((forms[0] == np.sign(tau) * forms[1]).all() and (forms[1] == forms[2]).all())
    if unanimous:
        # If all pairs agree then so do n // 2 disjoint ones, which happens with at most that power of their share.
        bound = 2 * tail ** (1 / (distinct // 2)) - 1
        lower, upper = (min(lower, bound), 1.0) if tau > 0 else (-1.0, max(upper, -bound))
    return Kendall(tau, lower, upper, confidence, draws, int(degenerate.sum()), unanimous)


_CELLS = 4_000_000
"""Number of floats held at once while resampling."""

_UNDEFINED = 2.0
"""Number in place of the τ of a resample that has none; SciPy warns at NaN."""
