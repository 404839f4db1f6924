"""The findings of an experiment, as numbers and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, final

from scipy.stats import mannwhitneyu

from isoflat.core.estimate import Estimate
from isoflat.core.plain import attributes, plain
from isoflat.core.record import Record
from isoflat.core.table import Omission
from isoflat.experiments.cells import MeasuredNetwork
from isoflat.experiments.numbers import COLUMNS, Number, flat_row
from isoflat.experiments.recipe import Arm, Asks, Recipe
from isoflat.experiments.statistics.relation import OutcomeRelation, relations
from isoflat.experiments.statistics.sample import OutcomeSample
from isoflat.experiments.verdict import SIGNIFICANCE, GroupFinding, GroupVerdict, compare

DRAWS = 2000
"""Number of resamples and of permutations."""


@final
@dataclass(frozen=True)
class Summary:
    """A number over the networks of an arm.

    Attributes:
        arm: name of the arm.
        number: name of the number.
        networks: number of networks of which the number is known.
        mean: mean over these networks.
        error: standard error of the mean; None for a single network.
        width: width of the widest confidence interval, relative to its value.
        unconverged: how many confidence intervals are wider than asked for.
    """

    arm: str
    number: str
    networks: int
    mean: float
    error: float | None
    width: float
    unconverged: int

    @property
    def words(self) -> str:
        """Mean and standard error as text."""
        return f"{self.mean:.4g}" if self.error is None else f"{self.mean:.4g} ± {self.error:.2g}"


@final
@dataclass(frozen=True)
class Reproduction:
    """The findings of an experiment.

    Attributes:
        recipe: recipe that was followed.
        data: name of the data set.
        numbers: numbers that were measured.
        networks: all networks, those that missed their target and those that diverged included.
        seconds: wall-clock time of this call; cells that were there already took none of it.
    """

    recipe: Recipe
    data: str
    numbers: tuple[Number, ...]
    networks: tuple[MeasuredNetwork, ...]
    seconds: float

    @property
    def missed(self) -> tuple[MeasuredNetwork, ...]:
        """Networks above their target loss: shown, but left out of comparisons."""
        return tuple(network for network in self.networks if not network.training.reached and not network.diverged)

    @property
    def diverged(self) -> tuple[MeasuredNetwork, ...]:
        """Networks whose training diverged, so that nothing was measured."""
        return tuple(network for network in self.networks if network.diverged)

    @property
    def omitted(self) -> tuple[Omission, ...]:
        """Numbers that could not be measured, with the reasons; networks that diverged are left out."""
        tables = (table for network in self.networks for table in (network.table, *network.moved))
        return tuple(dict.fromkeys(part for table in tables for part in table.omitted))

    @property
    def cost(self) -> float:
        """Seconds that all networks took when they were trained and measured."""
        return sum(network.seconds for network in self.networks)

    @property
    def records(self) -> tuple[Record, ...]:
        """Record of every measured number."""
        return tuple(row for network in self.networks for table in (network.table, *network.moved) for row in table)

    def arm(self, arm: Arm, all_of_them: bool = False) -> tuple[MeasuredNetwork, ...]:
        """Networks of one arm that reached their target, or all networks of the arm."""
        return tuple(
            network
            for network in self.networks
            if network.task.arm == arm and (all_of_them or network.training.reached)
        )

    @cached_property
    def summaries(self) -> tuple[Summary, ...]:
        """Summary of every number in every arm."""
        return tuple(
            summary
            for arm in self.recipe.arms
            for number in self.numbers
            if (summary := _summary(arm, number, self.arm(arm))) is not None
        )

    def verdicts(self, point: int | None = None) -> dict[str, GroupVerdict]:
        """Verdicts on the second of two arms against the first, one for every number.

        Args:
            point: a random point of each network's orbit; None for the weights as trained.

        Returns:
            Verdicts by name of the number; numbers that are not known, and positive, of two networks of each arm have none.
        """
        if len(self.recipe.arms) != 2:
            return {}
        made: dict[str, GroupVerdict] = {}
        for number in self.numbers:
            groups = []
            for arm in self.recipe.arms:
                tables = [n.table if point is None else n.moved[point] for n in self.arm(arm)]
                rows = [row for table in tables if (row := number.find(table)) is not None]
                groups.append((arm.minima, [row.estimate for row in rows]))
            if min(len(group) for _, group in groups) >= 2 and all(e.value > 0 for _, g in groups for e in g):
                made[number.name] = compare(f"the {number.words}", *groups)
        return made

    @property
    def points(self) -> int:
        """Number of points of each network's orbit where numbers were measured."""
        return min((len(network.moved) for network in self.networks if not network.diverged), default=0)

    def drift(self, number: Number) -> float | None:
        """Largest relative change of a number at the other weights of the same networks; None where it is not known."""
        return max(self._changes(number), default=None)

    def _changes(self, number: Number) -> tuple[float, ...]:
        """Largest relative change of a number in each network of which it is known at two weights or more."""
        each = (
            [
                abs(after.estimate.value - before.estimate.value) / abs(before.estimate.value)
                for table in network.moved
                if (after := number.find(table)) is not None
            ]
            for network in self.networks
            if (before := number.find(network.table)) is not None and before.estimate.value
        )
        return tuple(max(changes) for changes in each if changes)

    @cached_property
    def relations(self) -> tuple[OutcomeRelation, ...]:
        """Relations of each number to what rises along the arms and to the test error, where a recipe asks for a trend."""
        return self._relations(None) if self.recipe.asks is Asks.TREND else ()

    @cached_property
    def relations_elsewhere(self) -> tuple[tuple[OutcomeRelation, ...], ...]:
        """Relations, as in `relations`, at each random point of the networks' orbits."""
        return tuple(self._relations(point) for point in range(self.points)) if self.recipe.asks is Asks.TREND else ()

    def _relations(self, point: int | None) -> tuple[OutcomeRelation, ...]:
        outcomes = (
            (lambda network: network.task.arm.value, self.recipe.along),
            (lambda network: network.test_error, "test error"),
        )
        return tuple(found for outcome, words in outcomes for found in self._related(outcome, words, point))

    def _related(
        self, outcome: Callable[[MeasuredNetwork], float | None], words: str, point: int | None
    ) -> tuple[OutcomeRelation, ...]:
        samples = {
            number.words if number.sign > 0 else f"negated {number.words}": sample
            for number in self.numbers
            if (sample := self._sample(number, outcome, point)) is not None
        }
        return relations(samples, self.recipe.seed, DRAWS, outcome=words) if samples else ()

    def _sample(
        self, number: Number, outcome: Callable[[MeasuredNetwork], float | None], point: int | None
    ) -> OutcomeSample | None:
        """Sample of a number, turned so that a higher one is sharper, and an outcome; None where too few are known."""
        known = [
            (number.sign * row.estimate.value, float(after), network)
            for network in self.networks
            if network.training.reached
            and (row := number.find(network.table if point is None else network.moved[point])) is not None
            and (after := outcome(network)) is not None
        ]
        if len(known) < 3 or len({after for _, after, _ in known}) < 2:
            return None
        return OutcomeSample(
            values=tuple(value for value, _, _ in known),
            outcomes=tuple(after for _, after, _ in known),
            losses=tuple(network.training.loss for _, _, network in known),
            labels=tuple(network.label for _, _, network in known),
        )

    @property
    def headline(self) -> str:
        """Shortest sentence that answers the recipe's question."""
        if self.recipe.asks is Asks.DISSENT and (told := self._dissent()):
            return told
        verdicts = [verdict.claim for verdict in self.verdicts().values()]
        claims = verdicts or [relation.claim for relation in self.relations]
        return f"{claims[0]}." if claims else next(iter(self.sentences), "Nothing could be compared.")

    @property
    def sentences(self) -> tuple[str, ...]:
        """Sentences that say what was found, the answer first."""
        return tuple(self._sentences())

    def _sentences(self) -> Iterator[str]:
        match self.recipe.asks:
            case Asks.CONTRAST:
                yield from self._contrast()
            case Asks.TREND:
                yield from self._trend()
            case Asks.DISSENT:
                yield from self._generalization()
                yield from self._contrast()
        yield from self._moved()
        if self.missed:
            names = ", ".join(f"{network.label} ({network.training.loss:.3g})" for network in self.missed)
            yield f"Left out of the comparison, because they missed the target loss: {names}."
        for message, names in _grouped((network.diverged, network.label) for network in self.diverged).items():
            yield f"Left out of the comparison, because they diverged: {names} ({message})."
        for reason, labels in _grouped((str(part), part.label) for part in self.omitted).items():
            yield f"Not known of {labels}: {reason}."

    def _contrast(self) -> Iterator[str]:
        made = self.verdicts()
        if not made:
            few = min(len(self.arm(arm)) for arm in self.recipe.arms) < 2
            yield (
                "No comparison: fewer than two networks of an arm reached the target loss."
                if few
                else "No comparison: no number is known, and positive, of two networks of each arm."
            )
        yield from (verdict.sentence for verdict in made.values())
        for point in range(self.points):
            for name, verdict in self.verdicts(point).items():
                before = made.get(name)
                if before is not None:
                    how = self._elsewhere(point + 1, verdict.number, verdict.finding == before.finding)
                    yield f"{how} {verdict.claim}, p = {verdict.p:.2g}."

    def _elsewhere(self, point: int, number: str, same: bool) -> str:
        """The start of a sentence on a number at other weights of the same networks."""
        return (
            f"At a random point of every network's orbit ({point} of {self.points}), where the weights are others and the "
            f"functions the same, {number} gives {'the same' if same else 'another'} verdict:"
        )

    def _trend(self) -> Iterator[str]:
        yield from (relation.sentence for relation in self.relations)
        before = {(relation.measure, relation.outcome): relation for relation in self.relations}
        for point, told in enumerate(self.relations_elsewhere, 1):
            for relation in told:
                same = before.get((relation.measure, relation.outcome))
                if same is not None:
                    how = self._elsewhere(point, f"the {relation.measure}", relation.finding == same.finding)
                    tau, p = relation.kendall.tau, relation.p_holm
                    evidence = "" if tau is None else f" (τ-b {tau:+.2f}, p = {p:.2g} after correction)"
                    yield f"{how} {relation.claim}{evidence}."

    @cached_property
    def _better(self) -> tuple[int | None, str] | None:
        """Index of the arm that generalizes better, if there is evidence, and test errors in words; None where not known."""
        first, second = ([n.test_error for n in self.arm(arm) if n.test_error is not None] for arm in self.recipe.arms)
        if min(len(first), len(second)) < 2:
            return None
        test = mannwhitneyu(second, first, alternative="two-sided")
        names = [arm.minima for arm in self.recipe.arms]
        errors = (
            f"test error {100 * fmean(second):.2f} % of {names[1]}, {100 * fmean(first):.2f} % of {names[0]}, two-sided "
            f"Mann-Whitney p = {test.pvalue:.2g}"
        )
        return (None if test.pvalue >= SIGNIFICANCE else int(fmean(second) < fmean(first))), errors

    def _generalization(self) -> Iterator[str]:
        """Sentences on the test errors of the two arms, and on whether flatness agrees."""
        if self._better is None:
            return
        better, errors = self._better
        if better is None:
            yield f"There is no evidence that one generalizes better ({errors})."
            return
        names = [arm.minima for arm in self.recipe.arms]
        yield f"{_capital(names[better])} generalize better ({errors})."
        for verdict in self.verdicts().values():
            if verdict.finding is not GroupFinding.NO_EVIDENCE:
                sharper = int(verdict.finding is GroupFinding.SHARPER)
                friend = "a false friend here" if sharper == better else "a true friend here"
                yield f"{_capital(verdict.number)} is {friend}: it calls {names[sharper]} sharper."

    def _dissent(self) -> str | None:
        """Sentence on generalization and flatness, where there is evidence on both."""
        found = [verdict for verdict in self.verdicts().values() if verdict.finding is not GroupFinding.NO_EVIDENCE]
        if self._better is None or self._better[0] is None or not found:
            return None
        better = self._better[0]
        sharper = int(found[0].finding is GroupFinding.SHARPER) == better
        minima, called = self.recipe.arms[better].minima, "sharper" if sharper else "flatter"
        return f"{_capital(minima)} generalize better, and {found[0].number} calls them {called}."

    def _moved(self) -> Iterator[str]:
        if not self.points:
            return
        edited = self.recipe.edit is not None
        how = "Rescaling the layers moves" if edited else "Other weights with the same function, at random, move"
        for number in self.numbers:
            changes = self._changes(number)
            if changes:
                change = max(changes)
                moved = f"by {change:.1e} of itself" if change < 0.5 else f"by {change:.2g} times itself"
                yield f"{how} the {number.words} {moved} at most, over {len(changes)} networks."

    def rows(self) -> list[dict[str, Any]]:
        """Flat rows, one for each network, point and number; a network without numbers has one row, too."""
        return [
            {
                "recipe": self.recipe.name,
                "scale": str(self.recipe.scale),
                "arm": network.task.arm.name,
                "replicate": network.task.replicate,
                "point": place,
                "training_loss": None if network.diverged else network.training.loss,
                "reached": network.training.reached,
                "train_error": network.train_error,
                "test_error": network.test_error,
                "test_loss": network.test_loss,
                "epochs": None if network.diverged else network.training.epochs,
                "steps": None if network.diverged else network.training.steps,
                "seconds": network.seconds,
                **(flat_row(row) if row is not None else dict.fromkeys(COLUMNS)),
                **({"diverged": network.diverged} if network.diverged else {}),
            }
            for network in self.networks
            for place, table in enumerate((network.table, *network.moved))
            for row in (table.rows or (() if place else (None,)))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            **attributes(self, "data", "sentences", "summaries"),
            "verdicts": plain(self.verdicts()),
            "moved": plain([self.verdicts(point) for point in range(self.points)]),
            "drift": {number.name: self.drift(number) for number in self.numbers},
            "relations": plain(self.relations),
            "relations_elsewhere": plain(self.relations_elsewhere),
            "networks": self.rows(),
            "diverged": [{"label": network.label, "reason": network.diverged} for network in self.diverged],
            "omitted": plain(self.omitted),
            "cost_seconds": self.cost,
            "seconds": self.seconds,
        }


def _grouped(told: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Join the labels of which the same is said."""
    groups: dict[str, list[str]] = {}
    for what, label in told:
        groups.setdefault(what, []).append(label)
    return {what: ", ".join(dict.fromkeys(labels)) for what, labels in groups.items()}


def _summary(arm: Arm, number: Number, networks: Sequence[MeasuredNetwork]) -> Summary | None:
    rows = [row.estimate for network in networks if (row := number.find(network.table)) is not None]
    if not rows:
        return None
    values = [row.value for row in rows]
    return Summary(
        arm.name,
        number.name,
        len(rows),
        fmean(values),
        stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
        max((_width(row) for row in rows), default=0.0),
        sum(not row.converged for row in rows),
    )


def _width(estimate: Estimate) -> float:
    """Width of a confidence interval, relative to the value; zero where the interval is infinite or the value zero."""
    width = estimate.upper - estimate.lower
    return width / abs(estimate.value) if estimate.value and math.isfinite(width) else 0.0


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
