"""Comparison of two groups of networks: is one sharper? With an effect size and an exact rank test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import numpy as np
from scipy.stats import mannwhitneyu

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.plain import attributes

SIGNIFICANCE = 0.05
"""Level below which a p-value counts as evidence."""


class GroupFinding(StrEnum):
    """Finding about the second of two groups of networks."""

    SHARPER = "sharper"
    FLATTER = "flatter"
    NO_EVIDENCE = "no evidence"


@final
@dataclass(frozen=True)
class GroupVerdict:
    """A comparison of two groups by one number that is lower for flatter minima.

    Attributes:
        number: name of the number in words, such as "the paper's number".
        baseline: name of the first group.
        other: name of the second group.
        finding: whether the second group is sharper or flatter, if there is evidence.
        ratio: geometric mean of the second group over that of the first.
        median_ratio: median of the second group over that of the first.
        superiority: share of pairs, one network of each group, in which the second is sharper; ties count half.
        p: p-value of the two-sided Mann-Whitney test; exact where there are no ties.
        floor: the smallest p-value that so many networks can give.
        sizes: number of networks in each group.
        undecided: number of pairs whose confidence intervals overlap, so that the order is not certain.
    """

    number: str
    baseline: str
    other: str
    finding: GroupFinding
    ratio: float
    median_ratio: float
    superiority: float
    p: float
    floor: float
    sizes: tuple[int, int]
    undecided: int

    @property
    def delta(self) -> float:
        """Cliff's delta: share of pairs in which the second is sharper, less the share in which it is flatter."""
        return 2 * self.superiority - 1

    @property
    def claim(self) -> str:
        """The finding in one clause."""
        if self.finding is GroupFinding.NO_EVIDENCE:
            return f"By {self.number} there is no evidence that {self.other} and {self.baseline} differ"
        times = self.ratio if self.finding is GroupFinding.SHARPER else 1 / self.ratio
        how_much = f"{times:.1f} times " if times > 1 else ""  # an outlier can turn the means against the ranks
        return f"By {self.number}, {self.other} are {how_much}{self.finding} than {self.baseline}"

    @property
    def sentence(self) -> str:
        """The finding with its evidence."""
        pairs = self.sizes[0] * self.sizes[1]
        limit = f"no p below {self.floor:.2g} is possible"
        if self.floor > SIGNIFICANCE:
            limit += f", so nothing can be shown at the {SIGNIFICANCE:g} level: use more seeds"
        elif math.isclose(self.p, self.floor):
            limit = "the smallest p possible"
        doubt = f"; {self.undecided} of {pairs} pairs have overlapping enclosures" if self.undecided else ""
        return (
            f"{self.claim} (ratio of geometric means {self.ratio:.3g}, of medians {self.median_ratio:.3g}; sharper in "
            f"{self.superiority * pairs:g} of {pairs} pairs, Cliff's delta {self.delta:+.2f}; two-sided Mann-Whitney "
            f"p = {self.p:.2g} with {self.sizes[0]} against {self.sizes[1]} networks, {limit}{doubt})."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**attributes(self), "delta": self.delta, "sentence": self.sentence}


def compare(
    number: str, baseline: tuple[str, Sequence[Estimate]], other: tuple[str, Sequence[Estimate]]
) -> GroupVerdict:
    """Compare two groups by a positive number that is lower for flatter minima.

    Args:
        number: name of the number in the sentence, such as "the paper's number".
        baseline: plural name of the first group, and its estimates.
        other: plural name of the second group, and its estimates.

    Raises:
        UsageError: a group has fewer than two networks, or a number is not positive.

    >>> from isoflat.core.estimate import Kind
    >>> group = lambda *values: [Estimate(v, v, v, 1.0, Kind.ENCLOSURE, True) for v in values]
    >>> compare("λ", ("A", group(1, 2, 3, 4)), ("B", group(10, 20, 30, 40))).claim
    'By λ, B are 10.0 times sharper than A'
    """
    first, second = (np.array([estimate.value for estimate in group]) for _, group in (baseline, other))
    if min(len(first), len(second)) < 2:
        raise UsageError(f"a rank test needs at least two networks per group, got {len(first)} and {len(second)}")
    if not (first > 0).all() or not (second > 0).all():
        raise UsageError("a ratio of geometric means needs positive numbers")
    ties = len(np.unique(np.concatenate([first, second]))) < len(first) + len(second)
    test = mannwhitneyu(second, first, alternative="two-sided", method="asymptotic" if ties else "exact")
    p, superiority = float(test.pvalue), float(test.statistic) / (len(first) * len(second))
    finding = GroupFinding.NO_EVIDENCE
    if p < SIGNIFICANCE:
        finding = GroupFinding.SHARPER if superiority > 0.5 else GroupFinding.FLATTER
    return GroupVerdict(
        number=number,
        baseline=baseline[0],
        other=other[0],
        finding=finding,
        ratio=float(np.exp(np.log(second).mean() - np.log(first).mean())),
        median_ratio=float(np.median(second) / np.median(first)),
        superiority=superiority,
        p=p,
        floor=min(1.0, 2 / math.comb(len(first) + len(second), len(first))),
        sizes=(len(first), len(second)),
        undecided=sum(a.lower <= b.upper and b.lower <= a.upper for a in baseline[1] for b in other[1]),
    )
