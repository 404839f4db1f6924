"""The sample that every statistic here looks at: a measure and an outcome of the same networks, and how these were trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import final

import numpy as np

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream

Level = str | float
"""A value of a hyper-parameter; values are compared exactly."""

LEAST = 3
"""Smallest number of networks with which a statistic has a meaning."""


@final
@dataclass(frozen=True)
class OutcomeSample:
    """One measure of many trained networks, beside their outcome.

    Attributes:
        values: the measure's numbers, so oriented that a higher one should go with a larger outcome.
        outcomes: generalisation gaps, test errors or test losses, one per network.
        factors: values of hyper-parameters by name, one per network; networks alike in all of them are replicates.
        losses: training losses, one per network; None where they are not known.
        labels: names of the networks, one per network; empty for none.

    Raises:
        UsageError: the lengths differ, a number is not finite, or there are fewer than three networks.

    >>> len(OutcomeSample((1.0, 2.0, 3.0), (0.1, 0.2, 0.3)))
    3
    """

    values: tuple[float, ...]
    outcomes: tuple[float, ...]
    factors: Mapping[str, tuple[Level, ...]] = field(default_factory=dict)
    losses: tuple[float, ...] | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse samples without meaning."""
        networks = len(self.values)
        if networks < LEAST:
            raise UsageError(f"a relation needs at least {LEAST} networks, got {networks}: train more")
        columns: dict[str, Sequence[object]] = {"outcomes": self.outcomes}
        columns |= {f"factor {name!r}": levels for name, levels in self.factors.items()}
        columns |= {"losses": self.losses} if self.losses is not None else {}
        columns |= {"labels": self.labels} if self.labels else {}
        for name, column in columns.items():
            if len(column) != networks:
                raise UsageError(f"expected one entry per network, got {networks} values but {len(column)} of {name}")
        _need_finite("values", self.values)
        _need_finite("outcomes", self.outcomes)
        _need_finite("losses", self.losses or ())
        for name, levels in self.factors.items():
            _need_finite(f"factor {name!r}", [level for level in levels if not isinstance(level, str)])

    def __len__(self) -> int:
        """Number of networks."""
        return len(self.values)

    @property
    def ordered(self) -> OutcomeSample:
        """The sample in an order by outcome and value, so that random draws do not depend on the order given."""
        names = sorted(self.factors)
        losses = self.losses or (0.0,) * len(self)
        order = sorted(
            range(len(self)),
            key=lambda i: (
                self.outcomes[i],
                self.values[i],
                losses[i],
                [repr(self.factors[name][i]) for name in names],
            ),
        )
        return OutcomeSample(
            values=tuple(self.values[i] for i in order),
            outcomes=tuple(self.outcomes[i] for i in order),
            factors={name: tuple(self.factors[name][i] for i in order) for name in names},
            losses=tuple(losses[i] for i in order) if self.losses is not None else None,
            labels=tuple(self.labels[i] for i in order) if self.labels else (),
        )

    def groups(self, leaving: str | None = None) -> tuple[tuple[int, ...], ...]:
        """Groups of networks that are alike in every hyper-parameter, or in every one but one.

        Args:
            leaving: the hyper-parameter that may differ within a group; None for none.
        """
        held = [levels for name, levels in self.factors.items() if name != leaving]
        found: dict[tuple[Level, ...], list[int]] = {}
        for network in range(len(self)):
            found.setdefault(tuple(levels[network] for levels in held), []).append(network)
        return tuple(tuple(group) for group in found.values())

    def pairs(self, group: Sequence[int], name: str) -> Iterator[tuple[int, int]]:
        """Pairs within a group that differ in a hyper-parameter; replicates are not compared.

        Args:
            group: positions of networks that are alike in every other hyper-parameter.
            name: name of the hyper-parameter.
        """
        levels = self.factors[name]
        return ((i, j) for i, j in combinations(group, 2) if levels[i] != levels[j])


def signs(numbers: Sequence[float]) -> np.ndarray:
    """Signs of all differences: entry (i, j) says whether number i is above (1), below (-1) or level with number j.

    Args:
        numbers: numbers, one per network.

    >>> signs([1.0, 3.0, 3.0]).tolist()
    [[0, -1, -1], [1, 0, 0], [1, 0, 0]]
    """
    column = np.asarray(numbers, dtype=float)
    return (column[:, None] > column).astype(np.int64) - (column[:, None] < column)


def generator_of(seed: int, label: str) -> np.random.Generator:
    """The generator of the random draws of one statistic.

    Args:
        seed: seed of the whole analysis.
        label: name of the statistic; the measure has no part in it, so that all measures meet the same draws.
    """
    return np.random.default_rng(stream(seed, "statistics", label).initial_seed() % 2**64)


def _need_finite(name: str, numbers: Sequence[object]) -> None:
    for number in numbers:
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise UsageError(f"expected finite Python numbers in {name}, got {number!r}: leave that network out")
