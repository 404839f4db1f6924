"""The relation of a measure to generalisation: all its statistics, corrected for all measures that were tried, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from isoflat.core.errors import UsageError
from isoflat.core.plain import attributes
from isoflat.experiments.statistics.conditional import ConditionalInformation, conditional
from isoflat.experiments.statistics.granulated import GranulatedKendall, granulated
from isoflat.experiments.statistics.kendall import Kendall, kendall
from isoflat.experiments.statistics.multiplicity import benjamini_hochberg, holm
from isoflat.experiments.statistics.partial import PartialCorrelation, partial
from isoflat.experiments.statistics.permutation import PermutationTest, permutation
from isoflat.experiments.statistics.robust import RobustRanking, replicate_noise, robust
from isoflat.experiments.statistics.sample import OutcomeSample
from isoflat.experiments.verdict import SIGNIFICANCE

STRENGTHS = ((0.6, "strong"), (0.3, "moderate"), (0.0, "weak"))
"""Words for the strength of a relation, each with the smallest τ that it is used for."""


@final
@dataclass(frozen=True)
class OutcomeRelation:
    """The relation of one measure to the outcome, over all networks.

    Attributes:
        measure: name of the measure.
        outcome: name of the outcome in words.
        networks: number of networks.
        measures: number of measures that were tried together; p-values are corrected for them.
        kendall: rank correlation, with an interval.
        permutation: test of the rank correlation by permutations.
        p_holm: p-value of that test, corrected so that one false finding among all measures is improbable (Holm).
        p_discovery: p-value of that test, corrected for the share of false findings (Benjamini and Hochberg).
        floor_holm: the smallest `p_holm` that was possible.
        granulated: rank correlations where a single hyper-parameter changes.
        robust: errors over environments; weighted by the noise between replicates, if there are any.
        conditional: information that the measure adds to the hyper-parameters.
        partial: rank correlation given the training loss; None if that is not known.
        partial_holm: p-value of `partial`, corrected as `p_holm`.
        partial_floor: the smallest `partial_holm` that was possible.
    """

    measure: str
    outcome: str
    networks: int
    measures: int
    kendall: Kendall
    permutation: PermutationTest
    p_holm: float
    p_discovery: float
    floor_holm: float
    granulated: GranulatedKendall
    robust: RobustRanking
    conditional: ConditionalInformation
    partial: PartialCorrelation | None
    partial_holm: float | None
    partial_floor: float | None

    @property
    def found(self) -> bool:
        """True if there is evidence of a relation, after correction."""
        return self.p_holm < SIGNIFICANCE

    @property
    def finding(self) -> str:
        """The finding in a word: the measure rises or falls with the outcome, or there is no evidence."""
        tau = self.kendall.tau
        return "no evidence" if not self.found or tau is None else "rises" if tau > 0 else "falls"

    @property
    def claim(self) -> str:
        """The finding in one clause."""
        tau = self.kendall.tau
        if tau is None:
            return f"Nothing can be said of the {self.measure}: all its values, or all outcomes, are equal"
        if not self.found:
            return f"There is no evidence that the {self.measure} is related to the {self.outcome}"
        strength = next(name for least, name in STRENGTHS if abs(tau) >= least)
        larger = "larger" if tau > 0 else "smaller, not larger,"
        return f"A higher {self.measure} goes with a {larger} {self.outcome}: a {strength} relation"

    @property
    def sentence(self) -> str:
        """The finding with its evidence, and what speaks against it."""
        if self.kendall.tau is None:
            return f"{self.claim} ({self.networks} networks)."
        parts = [f"{self.claim} ({self._evidence})", self._robustness]
        if self.found:
            parts += [self._given_loss, self._information]
        return "; ".join(part for part in parts if part) + "."

    @property
    def _evidence(self) -> str:
        kendall, test = self.kendall, self.permutation
        spoilt = f" ({kendall.degenerate} of {kendall.draws} resamples were all ties)" if kendall.degenerate else ""
        spoilt = " (from disjoint pairs, as all pairs agree)" if kendall.unanimous else spoilt
        tried = f"{_p(self.p_holm)} after Holm's correction for {self.measures} measures" if self.measures > 1 else ""
        text = (
            f"Kendall's τ-b {kendall.tau:+.2f}, {100 * kendall.confidence:g} % interval {kendall.lower:+.2f} to "
            f"{kendall.upper:+.2f}{spoilt}; two-sided {'exact ' if test.exact else ''}permutation {_p(test.p)}"
            f"{', ' + tried if tried else ''}; {self.networks} networks"
        )
        if self.floor_holm >= SIGNIFICANCE:
            corrected = f", {self.floor_holm:.2g} when corrected" if self.measures > 1 else ""
            text += (
                f"; the smallest p possible was {test.floor:.2g}{corrected}, so nothing could be shown at the "
                f"{SIGNIFICANCE:g} level: use more {'draws' if test.bound_by_draws else 'networks'}"
            )
        return text

    @property
    def _robustness(self) -> str:
        psi, worst = self.granulated.mean, self.robust.worst
        if psi is None or self.robust.mean is None or worst is None:
            return "no two networks differ in one hyper-parameter only" if self.found else ""
        weighing = ", pairs weighted by the noise between replicates" if self.robust.noise is not None else ""
        return (
            f"where only one hyper-parameter changes, τ is {psi:+.2f} on average over hyper-parameters, and the order is "
            f"wrong in {100 * self.robust.mean:.0f} % of pairs on average over {len(self.robust.environments)} "
            f"environments and in {100 * worst.error:.0f} % in the worst ({worst.name}{weighing}), where guessing has 50 %"
        )

    @property
    def _given_loss(self) -> str:
        if self.partial is None or self.partial_holm is None or self.partial_floor is None:
            return "the training losses are not known and might explain it"
        if self.partial.rho is None:
            return "the training loss orders the networks just as well, so that nothing is left when it is given"
        corrected = " (corrected)" if self.measures > 1 else ""
        numbers = f"partial Spearman correlation {self.partial.rho:+.2f}, {_p(self.partial_holm)}{corrected}"
        if self.partial_floor >= SIGNIFICANCE:
            return f"given the training loss nothing could be shown with so many networks and draws ({numbers})"
        if self.partial_holm >= SIGNIFICANCE:
            return f"given the training loss there is no evidence left ({numbers})"
        turned = " but is turned round" if self.partial.rho * (self.kendall.tau or 0.0) < 0 else ""
        return f"given the training loss a relation remains{turned} ({numbers})"

    @property
    def _information(self) -> str:
        score, chance = self.conditional.score, self.conditional.chance
        if score is None or chance is None:
            return ""
        given = f" given {' and '.join(self.conditional.given)}" if self.conditional.given else ""
        all_pairs = self.conditional.pairs + self.conditional.tied
        ties = f", from the {self.conditional.pairs} of {all_pairs} pairs without ties" if self.conditional.tied else ""
        return f"conditional information {score:.2f}{given} where chance gives {chance:.2f}{ties}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**attributes(self), "found": self.found, "finding": self.finding, "sentence": self.sentence}


def relations(
    samples: Mapping[str, OutcomeSample],
    seed: int = 0,
    draws: int = 9999,
    confidence: float = 0.95,
    outcome: str = "generalisation gap",
) -> tuple[OutcomeRelation, ...]:
    """Every statistic of every measure, with p-values corrected for all of them.

    Args:
        samples: samples by name of the measure; usually of the same networks.
        seed: seed of all random draws, which are the same for every measure.
        draws: number of resamples and of permutations, where these are random.
        confidence: confidence of intervals.
        outcome: name of the outcome in words.

    Raises:
        UsageError: there is no measure, or the draws or the confidence have no meaning.

    >>> numbers = tuple(float(i) for i in range(8))
    >>> relations({"sharpness": OutcomeSample(numbers, numbers)}, draws=99)[0].claim
    'A higher sharpness goes with a larger generalisation gap: a strong relation'
    """
    if not samples:
        raise UsageError("expected at least one measure, got none")
    samples = {name: sample.ordered for name, sample in samples.items()}
    tests = {name: permutation(sample, seed, draws) for name, sample in samples.items()}
    partials = {name: partial(sample, seed, draws) for name, sample in samples.items() if sample.losses is not None}
    p_holm = holm([test.p for test in tests.values()])
    p_discovery = benjamini_hochberg([test.p for test in tests.values()])
    floors = holm([test.floor for test in tests.values()])
    partial_holm = dict(zip(partials, holm([each.p for each in partials.values()]), strict=True))
    partial_floor = dict(zip(partials, holm([each.floor for each in partials.values()]), strict=True))
    return tuple(
        OutcomeRelation(
            measure=name,
            outcome=outcome,
            networks=len(sample),
            measures=len(samples),
            kendall=kendall(sample, seed, draws, confidence),
            permutation=tests[name],
            p_holm=p_holm[place],
            p_discovery=p_discovery[place],
            floor_holm=floors[place],
            granulated=granulated(sample),
            robust=robust(sample, replicate_noise(sample)),
            conditional=conditional(sample, seed),
            partial=partials.get(name),
            partial_holm=partial_holm.get(name),
            partial_floor=partial_floor.get(name),
        )
        for place, (name, sample) in enumerate(samples.items())
    )


def _p(p: float) -> str:
    return f"p = {p:.2g}" if p >= _SMALL else f"p < {_SMALL:g}"


_SMALL = 1e-12
"""Limit below which p-values are not told apart in words."""
