"""Robust ranking: the share of pairs that a measure orders wrongly, on average and in the worst environment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.special import erf

from isoflat.core.errors import UsageError
from isoflat.experiments.statistics.sample import Level, OutcomeSample, signs


@final
@dataclass(frozen=True)
class Environment:
    """Pairs of networks that differ in one hyper-parameter only, between the same two of its values.

    Attributes:
        factor: name of the hyper-parameter.
        levels: the two values.
        pairs: number of pairs of networks.
        weight: weight of all pairs together; their number, if noise is not considered.
        error: weighted share of pairs that the measure orders wrongly; ties count half.
    """

    factor: str
    levels: tuple[Level, Level]
    pairs: int
    weight: float
    error: float

    @property
    def name(self) -> str:
        """Name of the environment in words."""
        return f"{self.factor} {self.levels[0]} against {self.levels[1]}"


@final
@dataclass(frozen=True)
class RobustRanking:
    """Sign errors over environments.

    Attributes:
        environments: environments in which a pair has weight.
        mean: mean error over environments, all of the same weight; None without environments.
        worst: environment with the largest error; among equals that with the largest weight. None without environments.
        silent: number of environments left out because no difference of outcomes there exceeds the noise.
        noise: standard deviation of an outcome, by which pairs are weighted; None if they are not.
    """

    environments: tuple[Environment, ...]
    mean: float | None
    worst: Environment | None
    silent: int
    noise: float | None


def robust(sample: OutcomeSample, noise: float | None = None) -> RobustRanking:
    """Sign error of the measure in every environment (Dziugaite et al. 2020, arXiv:2010.11924).

    The error of a pair is (1 - sgn Δμ sgn Δg) / 2. A measure can be right on average and yet fail wherever one
    hyper-parameter is changed: the worst environment shows it. Where the noise is known, a pair weighs as much as the
    sign of its difference of outcomes is sure: 2Φ(|Δg| / σ√2) - 1, for normal noise of standard deviation σ. (There,
    only the noise of a finite test set is known, and the weight is Hoeffding's bound.)

    Args:
        sample: networks with hyper-parameters.
        noise: standard deviation of an outcome, such as `replicate_noise`; None to weigh all pairs alike.

    Raises:
        UsageError: the noise is negative or not finite.

    >>> robust(OutcomeSample((1.0, 2.0, 3.0), (1.0, 3.0, 2.0), {"width": (8, 16, 32)})).worst.name
    'width 16 against 32'
    """
    if noise is not None and not 0 <= noise < math.inf:
        raise UsageError(f"the noise of an outcome is a standard deviation, finite and not negative; got {noise}")
    errors = (1 - signs(sample.values) * signs(sample.outcomes)) / 2
    found: dict[tuple[str, tuple[Level, Level]], list[tuple[int, int]]] = {}
    for name, levels in sample.factors.items():
        for group in sample.groups(leaving=name):
            for i, j in sample.pairs(group, name):
                low, high = sorted((levels[i], levels[j]), key=_rank)
                found.setdefault((name, (low, high)), []).append((i, j))
    environments = []
    for (name, between), pairs in sorted(found.items(), key=lambda item: (item[0][0], *map(_rank, item[0][1]))):
        weights = np.array([_weight(sample.outcomes[i] - sample.outcomes[j], noise) for i, j in pairs])
        total = math.fsum(weights)
        if total > 0:
            error = math.fsum(weights * [errors[pair] for pair in pairs]) / total
            environments.append(Environment(name, between, len(pairs), total, error))
    return RobustRanking(
        environments=tuple(environments),
        mean=math.fsum(e.error for e in environments) / len(environments) if environments else None,
        worst=max(environments, key=lambda e: (e.error, e.weight), default=None),
        silent=len(found) - len(environments),
        noise=noise,
    )


def replicate_noise(sample: OutcomeSample) -> float | None:
    """Standard deviation of the outcome among networks alike in every hyper-parameter, pooled; None without any.

    Args:
        sample: networks with hyper-parameters.

    >>> replicate_noise(OutcomeSample((1.0, 2.0, 3.0), (0.0, 2.0, 5.0), {"width": (8, 8, 16)}))
    1.4142135623730951
    """
    groups = [group for group in sample.groups() if len(group) > 1] if sample.factors else []
    if not groups:
        return None
    outcomes = np.array(sample.outcomes)
    squares = math.fsum(outcomes[list(group)].var() * len(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def _weight(difference: float, noise: float | None) -> float:
    if noise is None:
        return 1.0
    return float(erf(abs(difference) / (2 * noise))) if noise > 0 else float(difference != 0)


def _rank(level: Level) -> tuple[bool, Level]:
    """Sort key that puts numbers before words."""
    return isinstance(level, str), level
