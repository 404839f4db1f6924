"""The relation of flatness to generalization: numbers of many trained networks beside how well these generalize."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

from isoflat.core.plain import attributes, plain
from isoflat.core.record import Record
from isoflat.core.render import leading
from isoflat.core.table import Table
from isoflat.experiments.numbers import Number, flat_row
from isoflat.experiments.statistics.relation import OutcomeRelation, relations
from isoflat.experiments.statistics.sample import LEAST, Level, OutcomeSample
from isoflat.experiments.verdict import SIGNIFICANCE
from isoflat.measures.catalogue import find_measure

NOTE = "Note"
"""Name of facts that say what was chosen while loading; there may be several."""

FACTOR = "factor."
"""Beginning of the columns of hyper-parameters in rows."""

Facts = tuple[tuple[str, str], ...]
"""Names and values that say what was studied."""

DRAWS = 4999
"""Number of resamples and of permutations."""

_GUESSING = 0.5
"""Share of pairs that guessing orders wrongly."""

_PROPER = {name.lower(): name for name in ("Hessian", "Fisher", "Rao", "Gauss", "Newton", "PAC", "Bayes")}


@final
@dataclass(frozen=True)
class ObservedNetwork:
    """A trained network with its numbers and how well it generalizes.

    Attributes:
        label: name of the network.
        table: numbers of the network.
        outcome: generalisation gap, test error or test loss; larger is worse.
        loss: training loss.
        factors: values of hyper-parameters by name; networks alike in all of them are replicates.
    """

    label: str
    table: Table
    outcome: float
    loss: float
    factors: Mapping[str, Level] = field(default_factory=dict)

    def value(self, number: Number) -> float | None:
        """Value of a number of this network; None where it was not measured, or is not finite."""
        row = number.find(self.table)
        return row.estimate.value if row is not None and math.isfinite(row.estimate.value) else None


@final
@dataclass(frozen=True)
class Prediction:
    """The relation of every number to the outcomes of many networks.

    Attributes:
        numbers: numbers that were measured.
        networks: networks that were measured.
        outcome: name of the outcome in words, such as "test error".
        seed: seed of all random draws.
        left_out: labels of networks that are left out, each with the reason.
        draws: number of resamples and of permutations.
        facts: names and values that say what was studied.
    """

    numbers: tuple[Number, ...]
    networks: tuple[ObservedNetwork, ...]
    outcome: str
    seed: int = 0
    left_out: tuple[tuple[str, str], ...] = ()
    draws: int = DRAWS
    facts: Facts = field(default=(), compare=False)

    @property
    def factors(self) -> dict[str, tuple[Level, ...]]:
        """Hyper-parameters that differ between networks, with their levels: numbers before words, each in order."""
        names = dict.fromkeys(name for network in self.networks for name in network.factors)
        levels = {name: {network.factors.get(name, "none") for network in self.networks} for name in names}
        return {
            name: tuple(sorted(there, key=lambda level: (isinstance(level, str), level)))
            for name, there in levels.items()
            if len(there) > 1
        }

    @property
    def records(self) -> tuple[Record, ...]:
        """Record of every measured number."""
        return tuple(row for network in self.networks for row in network.table)

    @cached_property
    def samples(self) -> dict[str, OutcomeSample]:
        """Samples by name of the number, turned so that a higher one is sharper; numbers of too few networks have none."""
        made: dict[str, OutcomeSample] = {}
        for number in self.numbers:
            known = self._known(number)
            if len(known) >= LEAST:
                sign = number.sign
                made[sharpness(number)] = OutcomeSample(
                    values=tuple(sign * value for value, _ in known),
                    outcomes=tuple(network.outcome for _, network in known),
                    factors={
                        name: tuple(network.factors.get(name, "none") for _, network in known) for name in self.factors
                    },
                    losses=tuple(network.loss for _, network in known),
                    labels=tuple(network.label for _, network in known),
                )
        return made

    def _known(self, number: Number) -> list[tuple[float, ObservedNetwork]]:
        pairs = ((network.value(number), network) for network in self.networks)
        return [(value, network) for value, network in pairs if value is not None]

    @cached_property
    def relations(self) -> tuple[OutcomeRelation, ...]:
        """Relation of each number to the outcome, with p-values corrected for all numbers."""
        return relations(self.samples, self.seed, self.draws, outcome=self.outcome) if self.samples else ()

    @property
    def strongest(self) -> OutcomeRelation | None:
        """The relation with the largest τ among those for which there is evidence; None where there is none."""
        shown = [relation for relation in self.relations if relation.found]
        return max(shown, key=lambda relation: abs(relation.kendall.tau or 0.0), default=None)

    @property
    def sentences(self) -> tuple[str, ...]:
        """Sentences that say what was found: the answer, what speaks against it, every number, and notes on these."""
        return (
            self.headline,
            *self.cautions,
            *(relation.sentence for relation in self.relations),
            *self.notes,
        )

    @property
    def headline(self) -> str:
        """The answer, in a sentence."""
        networks, tried, best = len(self.networks), len(self.relations), self.strongest
        if not tried:
            return f"Nothing can be said: a relation needs at least {LEAST} networks with a number, of {networks} here."
        if len({network.outcome for network in self.networks}) == 1:
            return f"Nothing can be said: all {networks} networks have the same {self.outcome}."
        each = f"any of the {tried} numbers" if tried > 1 else f"the {self.relations[0].measure}"
        if best is None:
            p, floor = (min(part) for part in zip(*((r.p_holm, r.floor_holm) for r in self.relations), strict=True))
            if floor >= SIGNIFICANCE:
                return (
                    f"With {networks} networks nothing can be shown of {each}: no p below {floor:.2g} is possible after "
                    "correction. Train more networks."
                )
            return (
                f"There is no evidence that {each} is related to the {self.outcome} over {networks} networks (smallest "
                f"corrected p = {p:.2g}); a weaker relation than so many networks can show is not ruled out."
            )
        count = sum(relation.found for relation in self.relations)
        larger = "larger" if (tau := best.kendall.tau or 0.0) > 0 else "smaller"
        against = "" if tau > 0 else ", against what flatness promises"
        how_many = f"{count} of {tried} numbers {'is' if count == 1 else 'are'} related to the {self.outcome}"
        first = f"{how_many}, most strongly the {best.measure}" if tried > 1 else f"The {best.measure} is related"
        to = "" if tried > 1 else f" to the {self.outcome}"
        return (
            f"{first}{to}: sharper networks have a {larger} one{against} (Kendall's τ {tau:+.2f} over {best.networks} "
            "networks)."
        )

    @property
    def cautions(self) -> tuple[str, ...]:
        """Sentences that speak against what was found: the training loss, and hyper-parameters whose effect is not predicted."""
        return tuple(self._cautions())

    def _cautions(self) -> Iterator[str]:
        shown, best = [relation for relation in self.relations if relation.found], self.strongest
        left = [r.measure for r in shown if r.partial_holm is not None and r.partial_holm < SIGNIFICANCE]
        if left:
            yield f"Given the training loss there is still evidence of {leading(left)}."
        elif shown:
            yield "Given the training loss there is no evidence left after correction: it may explain what was found."
        if best is not None and (worst := best.robust.worst) is not None and worst.error > _GUESSING:
            yield (
                f"What a change of a hyper-parameter does is not always predicted: where {worst.factor} is {worst.levels[0]} "
                f"against {worst.levels[1]}, the {best.measure} orders {100 * worst.error:.0f} % of pairs wrongly."
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on gaps in the data behind the relations."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        for number in self.numbers:
            known, words = self._known(number), sharpness(number)
            if len(known) < LEAST:
                yield f"The {words} is known of {len(known)} networks: too few for a relation."
            elif len(known) < len(self.networks):
                missing = leading([network.label for network in self.networks if network.value(number) is None])
                yield f"The {words} is known of {len(known)} of {len(self.networks)} networks, not of {missing}."
            groups = {row.group_hash for network in self.networks if (row := number.find(network.table)) is not None}
            if len(groups) > 1:
                yield (
                    f"The {words} is set side by side over {len(groups)} architectures with other symmetries: a difference "
                    "between these counts as one of flatness."
                )
        if loose := [row for row in self.records if not row.estimate.converged]:
            yield f"{len(loose)} of {len(self.records)} numbers are not known to the width asked for."
        for label, reason in self.left_out:
            yield f"Left out: {label}, {reason}."

    def rows(self) -> list[dict[str, Any]]:
        """One flat row for each network and number."""
        return [
            {
                "label": network.label,
                "outcome": network.outcome,
                "training_loss": network.loss,
                **{f"{FACTOR}{name}": level for name, level in network.factors.items()},
                **flat_row(row),
            }
            for network in self.networks
            for row in network.table
        ]

    @property
    def subject(self) -> dict[str, Any]:
        """The facts as plain values, for a result.

        >>> Prediction((), (), "gap", facts=(("Training loss", "as measured"), ("Note", "float32"))).subject
        {'training_loss': 'as measured', 'notes': ['float32']}
        """
        named = {name.lower().replace(" ", "_"): value for name, value in self.facts if name != NOTE}
        return {**named, "notes": [value for name, value in self.facts if name == NOTE]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            **attributes(self, "outcome", "seed", "draws"),
            "numbers": {number.name: sharpness(number) for number in self.numbers},
            **attributes(self, "factors", "sentences", "relations"),
            "networks": self.rows(),
            "omitted": plain([part for network in self.networks for part in network.table.omitted]),
            "left_out": [{"label": label, "reason": reason} for label, reason in self.left_out],
        }


def words(number: Number) -> str:
    """A number in a sentence, without article: by its name in the catalogue, as a study sets many side by side.

    >>> from isoflat.experiments.numbers import PAPER, PLAIN
    >>> words(PAPER), words(PLAIN)
    ('quotient spectral norm (layerwise)', 'Hessian spectral norm')
    >>> words(Number("", "relative_flatness(normalised=0)", "euclidean", "", ""))
    'relative flatness (normalised=0)'
    """
    entry = find_measure(number.measure)
    usual = entry.options == find_measure(entry.name).options
    name = entry.name if usual else entry.label.replace("(", " (")
    text = " ".join(_PROPER.get(word, word) for word in name.split("_"))
    for pair in ("Fisher Rao", "Gauss Newton", "PAC Bayes"):
        text = text.replace(pair, pair.replace(" ", "-"))
    place = f" ({number.geometry})" if entry.geometry is None else ""
    return f"{text}{place}" + (f", {number.logits} scores" if number.logits else "")


def sharpness(number: Number) -> str:
    """A number in a sentence, as in `words`, turned so that a higher one is sharper.

    >>> sharpness(Number("", "quotient_effective_rank", "auto", "", ""))
    'negated quotient effective rank (auto)'
    """
    return words(number) if number.sign > 0 else f"negated {words(number)}"
