"""Conditional information: the information about the outcome that a measure adds to the hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import final

import numpy as np
from scipy.special import xlogy

from isoflat.experiments.statistics.sample import OutcomeSample, generator_of, signs

MOST = 2
"""Largest number of hyper-parameters that are conditioned on at once."""


@final
@dataclass(frozen=True)
class ConditionalInformation:
    """Conditional independence score of Jiang et al.

    Attributes:
        score: K between 0 and 1: the smallest normalised conditional information; None if there is no pair without
            ties, or no set of hyper-parameters that leaves the outcome open.
        given: the set of hyper-parameters at which the conditional information is smallest.
        chance: mean score when the same values are dealt out to the networks at random. Information estimated from few
            pairs is never quite zero, so that only a score clearly above this one means something.
        pairs: number of pairs of networks that counted.
        tied: number of pairs dropped because their values or outcomes are equal. Dropping them flatters a measure that takes few
            values, so that scores with many ties are not to be compared with scores with few.
        settled: number of sets of hyper-parameters left out because they settle every sign of the outcome by themselves.
    """

    score: float | None
    given: tuple[str, ...]
    chance: float | None
    pairs: int
    tied: int
    settled: int


def conditional(sample: OutcomeSample, seed: int = 0, deals: int = 20) -> ConditionalInformation:
    """Conditional independence score K (Jiang et al. 2019, arXiv:1912.02178, section 3).

    For ordered pairs of networks, V_μ and V_g are the signs of the differences of measure and outcome, and U_S are the
    values both networks have of the hyper-parameters in S. Then K = min over |S| ≤ 2 of I(V_μ, V_g | U_S) / H(V_g | U_S).
    Probabilities are shares of the pairs without ties; on a full grid those of U_S are nearly uniform.

    Args:
        sample: networks with hyper-parameters.
        seed: seed of the random deals.
        deals: number of times that values are dealt out at random; 0 for no comparison with chance.

    >>> conditional(OutcomeSample((1.0, 2.0, 4.0, 3.0), (1.0, 2.0, 4.0, 3.0)), deals=0).score
    1.0
    """
    sample = sample.ordered
    networks = len(sample)
    first, second = np.nonzero(~np.eye(networks, dtype=bool))
    outcome_signs = signs(sample.outcomes)[first, second]
    value_signs = signs(sample.values)
    generator = generator_of(seed, "conditional")
    deal_of = [np.arange(networks), *(generator.permutation(networks) for _ in range(deals))]
    dealt = [value_signs[order[first], order[second]] for order in deal_of]
    sets = [chosen for size in range(MOST + 1) for chosen in combinations(sorted(sample.factors), size)]
    shares = np.full((len(dealt), len(sets)), np.nan)
    for column, chosen in enumerate(sets):
        cells = _cells(sample, chosen, first, second)
        for row, value in enumerate(dealt):
            shares[row, column] = _share(value, outcome_signs, cells)
    scores = [float(np.nanmin(row)) if not np.isnan(row).all() else None for row in shares]
    by_chance = [score for score in scores[1:] if score is not None]
    pairs = int(((dealt[0] != 0) & (outcome_signs != 0)).sum()) // 2
    return ConditionalInformation(
        score=scores[0],
        given=sets[int(np.nanargmin(shares[0]))] if scores[0] is not None else (),
        chance=float(np.mean(by_chance)) if by_chance else None,
        pairs=pairs,
        tied=len(first) // 2 - pairs,
        settled=int(np.isnan(shares[0]).sum()) if pairs else 0,
    )


def _cells(sample: OutcomeSample, chosen: tuple[str, ...], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of the cell of U_S in which each ordered pair lies."""
    cells = np.zeros(len(first), dtype=np.int64)
    for name in chosen:
        known: dict[object, int] = {}
        codes = np.array([known.setdefault(level, len(known)) for level in sample.factors[name]])
        cells = (cells * len(known) + codes[first]) * len(known) + codes[second]
        cells = np.unique(cells, return_inverse=True)[1].reshape(-1)
    return cells


def _share(value: np.ndarray, outcome: np.ndarray, cells: np.ndarray) -> float:
    """I(V_μ, V_g | U_S) / H(V_g | U_S) from counts; NaN if U_S settles V_g."""
    kept = (value != 0) & (outcome != 0)
    index = 4 * cells[kept] + 2 * (value[kept] > 0) + (outcome[kept] > 0)
    table = np.bincount(index, minlength=4 * (int(cells.max()) + 1)).reshape(-1, 2, 2).astype(float)
    unknown = _entropy(table.sum(axis=1))
    return (unknown - min(unknown, _entropy(table.reshape(-1, 2)))) / unknown if unknown > 0 else float("nan")


def _entropy(counts: np.ndarray) -> float:
    """Number of pairs times the conditional entropy of the last axis given the first."""
    totals = counts.sum(axis=1, keepdims=True)
    return float(-xlogy(counts, np.divide(counts, totals, out=np.ones_like(counts), where=totals > 0)).sum())
