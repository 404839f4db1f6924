"""Granulated Kendall coefficients: rank correlation where one hyper-parameter changes and the others are held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from isoflat.experiments.statistics.sample import OutcomeSample, signs


@final
@dataclass(frozen=True)
class GranulatedKendall:
    """Kendall coefficients within hyper-parameters.

    Attributes:
        psi: mean of τ over groups of networks that differ in one hyper-parameter only, by its name; None without a group.
        mean: Ψ, the mean of those ψ that exist; None if none does.
        groups: number of groups that counted, by hyper-parameter.
        silent: number of groups that did not count, by hyper-parameter: no two networks differ in it, or all outcomes of
            the group are tied.
    """

    psi: Mapping[str, float | None]
    mean: float | None
    groups: Mapping[str, int]
    silent: Mapping[str, int]


def granulated(sample: OutcomeSample) -> GranulatedKendall:
    """Granulated Kendall coefficients ψ and their mean Ψ (Jiang et al. 2019, arXiv:1912.02178, section 3).

    τ is τ-a, as there: the mean over pairs of the product of signs, with ties as zero. Replicates, which share the
    value of the hyper-parameter in question, are not compared.

    Args:
        sample: networks with hyper-parameters.

    >>> granulated(OutcomeSample((1.0, 2.0, 3.0, 4.0), (2.0, 1.0, 4.0, 3.0), {"a": (0, 0, 1, 1), "b": (0, 1, 0, 1)})).psi
    {'a': 1.0, 'b': -1.0}
    """
    agreement = signs(sample.values) * signs(sample.outcomes)
    psi: dict[str, float | None] = {}
    counted, silent = {}, {}
    for name in sample.factors:
        taus, groups = [], sample.groups(leaving=name)
        for group in groups:
            pairs = list(sample.pairs(group, name))
            if pairs and len({sample.outcomes[network] for network in group}) > 1:
                taus.append(float(np.mean([agreement[pair] for pair in pairs])))
        psi[name] = float(np.mean(sorted(taus))) if taus else None
        counted[name], silent[name] = len(taus), len(groups) - len(taus)
    found = [value for value in psi.values() if value is not None]
    return GranulatedKendall(psi, float(np.mean(sorted(found))) if found else None, counted, silent)
