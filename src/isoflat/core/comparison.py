"""Comparison of networks: numbers side by side, intervals for their differences, and sentences that say which is flatter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, final

from isoflat.core import render
from isoflat.core.errors import UsageError
from isoflat.core.estimate import value_over_interval
from isoflat.core.plain import attributes, check_schema, json_numbers
from isoflat.core.record import SCHEMA, Record
from isoflat.core.table import Table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from isoflat.core.fitted import FittedTable

LISTED = 6
"""Pairs without a winner that are listed in words, where all have one remedy; the JSON has all of them."""

_ENDS = ("value", "lower", "upper")
"""Fields that may be infinite."""

_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.])")
"""A number in a note that stands by itself, and is no part of a name."""


class Basis(StrEnum):
    """Ground on which the interval of a `Difference` rests."""

    INTERVALS = "two intervals"
    """The intervals of both numbers, set against each other; their failure probabilities add."""
    PROBES = "the same probes"
    """Student's t-interval of the mean of the differences, probe by probe."""
    IDENTICAL = "identical weights"
    """Weights, loss, gradient and number are the same to the last bit."""
    UNCERTIFIED = "uncertified"
    """At least one of the numbers has no upper end, so that neither has their difference."""


class Verdict(StrEnum):
    """Statement of a difference about its first network."""

    FLATTER = "flatter"
    SHARPER = "sharper"
    TIE = "tie"
    """The interval of the difference contains 0."""
    IDENTICAL = "identical weights"
    NOT_DECIDED = "not decided"
    """One of the numbers is uncertified."""


@final
@dataclass(frozen=True)
class Ratio:
    """The first number over the second, both positive.

    Attributes:
        value: the ratio of the values.
        lower: lower end of its interval; −∞ where the second number may be zero, or is uncertified.
        upper: upper end; ∞ likewise.

    >>> print(Ratio(2.6813, 2.6801, 2.6829), Ratio(2.0, -math.inf, math.inf))
    2.6813 2
    """

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        """The value, with as many digits as its interval deserves."""
        return render.estimated(self.value, self.lower, self.upper)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; infinities become strings."""
        return json_numbers(self, *_ENDS)


@final
@dataclass(frozen=True)
class Difference:
    """One number of two networks: the first minus the second.

    Attributes:
        measure: catalogue name.
        geometry: name of the metric.
        lower_is_flatter: True where a lower number means a flatter minimum.
        first: label of the network whose number comes with a plus.
        second: label of the one whose number is taken away.
        value: the difference of the values.
        lower: lower end of the interval it lies in; −∞ where nothing is known.
        upper: upper end; ∞ where nothing is known.
        confidence: probability that the interval holds.
        basis: ground on which the interval rests.
        standard_error: standard error of the mean difference; None unless both numbers have the same probes.
        ratio: first over second; None where one of them is not positive.
        remedy: advice on what would decide a tie; empty where it is decided.

    >>> gap = Difference("quotient_trace", "auto", True, "b", "a", -3.0, -4.0, -2.5, 0.95, Basis.PROBES)
    >>> gap.verdict, gap.flatter, str(gap)
    (<Verdict.FLATTER: 'flatter'>, 'b', '-3.0')
    """

    measure: str
    geometry: str
    lower_is_flatter: bool
    first: str
    second: str
    value: float
    lower: float
    upper: float
    confidence: float
    basis: Basis
    standard_error: float | None = None
    ratio: Ratio | None = None
    remedy: str = ""

    def __post_init__(self) -> None:
        """Refuse intervals that do not contain their value."""
        if not self.lower <= self.value <= self.upper:
            raise UsageError(f"difference {self.value!r} lies outside its interval [{self.lower!r}, {self.upper!r}]")

    @property
    def verdict(self) -> Verdict:
        """Statement about the first network."""
        if self.basis is Basis.UNCERTIFIED:
            return Verdict.NOT_DECIDED
        if self.basis is Basis.IDENTICAL:
            return Verdict.IDENTICAL
        if self.lower <= 0 <= self.upper:
            return Verdict.TIE
        return Verdict.FLATTER if (self.upper < 0) == self.lower_is_flatter else Verdict.SHARPER

    @property
    def flatter(self) -> str | None:
        """Label of the flatter network; None where neither is called flatter."""
        return {Verdict.FLATTER: self.first, Verdict.SHARPER: self.second}.get(self.verdict)

    def turned(self) -> Difference:
        """The second minus the first."""
        ratio = self.ratio
        if ratio is not None:
            known = math.isfinite(ratio.upper)
            ends = (1 / ratio.upper, 1 / ratio.lower) if known else (ratio.lower, ratio.upper)
            ratio = Ratio(1 / ratio.value, *ends)
        return replace(
            self,
            first=self.second,
            second=self.first,
            value=0.0 - self.value,
            lower=0.0 - self.upper,
            upper=0.0 - self.lower,
            ratio=ratio,
        )

    def __str__(self) -> str:
        """The value with its sign, and as many digits as its interval deserves."""
        if self.basis is Basis.IDENTICAL:
            return "0"
        return f"{'+' if self.value > 0 else ''}{render.estimated(self.value, self.lower, self.upper)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, with the verdict."""
        own = {**attributes(self), **json_numbers(self, *_ENDS)}
        return own | {"verdict": str(self.verdict), "flatter": self.flatter}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Difference:
        """Inverse of `to_dict`; floats return bit for bit."""
        ratio = data["ratio"]
        read: dict[str, Any] = {part.name: data[part.name] for part in fields(Difference)}
        read |= {key: float(data[key]) for key in _ENDS} | {"basis": Basis(data["basis"])}
        read["ratio"] = None if ratio is None else Ratio(*(float(ratio[key]) for key in _ENDS))
        return Difference(**read)


@final
@dataclass(frozen=True)
class Comparison(render.Printed):
    """Networks measured on the same samples, with the same probes and random starts, against each other.

    Prints itself on a terminal and in a notebook: flattest first, each with its difference to the reference.

    Attributes:
        rows: every number of every network, network by network; labels say which.
        differences: every pair in every number. The reference is never the first of a pair; of two others, the later
            one is.
        reference: label of the network that the others are printed against.
        notes: warnings to read before it is believed.
    """

    rows: tuple[Record, ...]
    differences: tuple[Difference, ...]
    reference: str
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a reference that was not measured."""
        if self.reference not in self.networks:
            raise UsageError(f"reference {self.reference!r} is none of the networks: {', '.join(self.networks)}")

    @property
    def networks(self) -> tuple[str, ...]:
        """Labels in the order given."""
        return tuple(dict.fromkeys(row.label for row in self.rows))

    @property
    def numbers(self) -> tuple[tuple[str, str], ...]:
        """Every measure with its geometry."""
        return tuple(dict.fromkeys((row.measure, row.geometry) for row in self.rows))

    @property
    def converged(self) -> bool:
        """True if every number of every network reached its tolerance."""
        return all(row.estimate.converged for row in self.rows)

    def __getitem__(self, label: str) -> Table:
        """The numbers of one network.

        Raises:
            KeyError: no network has that label.
        """
        if label not in self.networks:
            raise KeyError(label)
        return Table(tuple(row for row in self.rows if row.label == label))

    def __iter__(self) -> Iterator[Difference]:
        """The differences."""
        return iter(self.differences)

    def between(self, first: str, second: str, number: tuple[str, str] | None = None) -> Difference:
        """The first network's number minus the second's.

        Args:
            first: a label.
            second: another label.
            number: measure and geometry; the first of `numbers` by default.

        Raises:
            KeyError: there is no such pair, or no such number.
        """
        number = number or self.numbers[0]
        for gap in self._of(number):
            if {gap.first, gap.second} == {first, second}:
                return gap if gap.first == first else gap.turned()
        raise KeyError((first, second, number))

    def ranks(self, number: tuple[str, str] | None = None) -> dict[str, tuple[int, int]]:
        """The best and the worst place of each network, 1 for the flattest; they differ where a pair is not decided.

        Identical networks share a place.

        Args:
            number: measure and geometry; the first of `numbers` by default.
        """
        places = {}
        for label in self.networks:
            verdicts = [gap.verdict for gap in self._against(label, number)]
            sure = verdicts.count(Verdict.FLATTER) + verdicts.count(Verdict.IDENTICAL)
            places[label] = (1 + verdicts.count(Verdict.SHARPER), len(self.networks) - sure)
        return places

    def flattest(self, number: tuple[str, str] | None = None) -> str | None:
        """The network that is flatter than every one that is not identical to it; None where that is not certain.

        Args:
            number: measure and geometry; the first of `numbers` by default.
        """
        first = next((label for label, places in self.ranks(number).items() if places == (1, 1)), None)
        return first if first and any(gap.flatter for gap in self._against(first, number)) else None

    def sentence(self, number: tuple[str, str] | None = None) -> str:
        """Sentence that says which network is flatter by a number or, where that is not known, what would decide it.

        Args:
            number: measure and geometry; the first of `numbers` by default.
        """
        number = number or self.numbers[0]
        by = f"By {number[0]} ({number[1]})"
        doubts = _doubts([gap for gap in self._of(number) if gap.flatter is None])
        winner = self.flattest(number)
        if winner is not None:
            against = self._against(winner, number)
            same = [gap.second for gap in against if gap.verdict is Verdict.IDENTICAL]
            who = f"{' and '.join([winner, *same])} {'are' if same else 'is'} flatter than"
            return " ".join([f"{by}, {who} {_beaten([gap for gap in against if gap.flatter])}.", *doubts])
        if len(self.networks) == 2:
            return " ".join([f"{by}, neither is called flatter.", *doubts])
        first = [label for label, places in self.ranks(number).items() if places[0] == 1]
        return " ".join([f"{by}, none is called the flattest: it may be {render.enumerated(first, 'or')}.", *doubts])

    def ranking(self, number: tuple[str, str]) -> list[Record]:
        """The records of a number, flattest first.

        Args:
            number: measure and geometry.
        """
        places, sign = self.ranks(number), 1 if self.lower_is_flatter(number) else -1
        rows = {row.label: row for row in self.rows if (row.measure, row.geometry) == number}
        return sorted(rows.values(), key=lambda row: (*places[row.label], sign * row.estimate.value))

    def lower_is_flatter(self, number: tuple[str, str]) -> bool:
        """True where a lower value of this number means a flatter minimum."""
        return self._of(number)[0].lower_is_flatter

    def _of(self, number: tuple[str, str]) -> list[Difference]:
        return [gap for gap in self.differences if (gap.measure, gap.geometry) == number]

    def _against(self, label: str, number: tuple[str, str] | None) -> list[Difference]:
        """A network minus each other one."""
        return [self.between(label, other, number) for other in self.networks if other != label]

    @property
    def sentences(self) -> tuple[str, ...]:
        """One `sentence` for each number."""
        return tuple(self.sentence(number) for number in self.numbers)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes of the estimates in few lines: those that differ in numbers only become one, with the numbers' ranges.

        A line that is not about all networks begins with the labels of those that it is about.
        """
        kinds: dict[str, dict[str, list[str]]] = {}
        for row in self.rows:
            for note in row.estimate.notes:
                kinds.setdefault(_NUMBER.sub("#", note), {}).setdefault(note, []).append(row.label)
        lines = []
        for notes in kinds.values():
            whose = [label for label in self.networks if any(label in labels for labels in notes.values())]
            ranges = map(_range, zip(*map(_NUMBER.findall, notes), strict=True))
            text = _NUMBER.sub(lambda _, ranges=ranges: next(ranges), next(iter(notes)))
            lines.append(text if len(whose) == len(self.networks) else f"{', '.join(whose)}: {text}")
        return tuple(lines)

    def __rich__(self) -> Group:
        """Draw a table and a sentence for each number, and the notes below."""
        from rich.console import Group

        from isoflat.core.fitted import literal

        parts: list[Any] = []
        for number in self.numbers:
            parts += [literal(""), self._grid(number), literal(self.sentence(number))]
        notes = (literal(f"note: {note}", "yellow") for note in (*self.notes, *self.remarks))
        return Group(*parts[1:], literal(""), *notes)

    def _grid(self, number: tuple[str, str]) -> FittedTable:
        """One line per network, flattest first."""
        from isoflat.core.fitted import FittedTable

        other = self.reference
        heads = (
            "rank",
            "network",
            "loss",
            "accuracy",
            "value",
            f"difference to {other}",
            f"ratio to {other}",
            "verdict",
        )
        places = self.ranks(number)
        cells = []
        for row in self.ranking(number):
            label, (best, worst) = row.label, places[row.label]
            gap = None if label == other else self.between(label, other, number)
            accuracy, unreached = row.point.accuracy, "" if row.estimate.converged else "\nnot converged"
            cells.append(
                (
                    str(best) if best == worst else f"{best}–{worst}",
                    label,
                    f"{row.point.loss:.4g}",
                    "–" if accuracy is None else f"{accuracy:.4g}",
                    f"{value_over_interval(row.estimate)}{unreached}",
                    *(("reference", "", "") if gap is None else _cells(gap)),
                )
            )
        way = "lower" if self.lower_is_flatter(number) else "higher"
        return FittedTable(heads, cells, f"{number[0]} ({number[1]}), {way} is flatter", words=2)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, with ranks and sentences."""
        return {
            "schema": SCHEMA,
            "networks": list(self.networks),
            "reference": self.reference,
            **attributes(self, "rows", "differences"),
            "ranks": [
                {
                    "measure": number[0],
                    "geometry": number[1],
                    "flattest": self.flattest(number),
                    "ranks": {label: list(places) for label, places in self.ranks(number).items()},
                    "sentence": self.sentence(number),
                }
                for number in self.numbers
            ],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """Strict JSON; floats return bit for bit."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Comparison:
        """Inverse of `to_dict`.

        Raises:
            UsageError: it was written by another schema version.
        """
        check_schema(data, "comparison", SCHEMA, "compare again")
        return Comparison(
            rows=tuple(Record.from_dict(row) for row in data["rows"]),
            differences=tuple(Difference.from_dict(difference) for difference in data["differences"]),
            reference=data["reference"],
            notes=tuple(data["notes"]),
        )

    @staticmethod
    def from_json(text: str) -> Comparison:
        """Inverse of `to_json`."""
        return Comparison.from_dict(json.loads(text))


def _cells(gap: Difference) -> tuple[str, str, Text]:
    """Difference with its interval below, ratio and verdict in a table."""
    from isoflat.core.fitted import literal

    verdict = gap.verdict
    style = {Verdict.FLATTER: "green", Verdict.SHARPER: "red"}.get(verdict, "yellow")
    bounds = ""
    if math.isfinite(gap.upper) and gap.basis is not Basis.IDENTICAL:
        bounds = render.bounds(gap.lower, gap.upper)
    ratio = "–" if gap.ratio is None else str(gap.ratio)
    return f"{gap}\n{bounds}".strip(), ratio, literal(verdict, style)


def _beaten(against: list[Difference]) -> str:
    """Name the networks that one is flatter than, with the confidence that it is."""
    confidence = f"confidence {max(0.0, 1 - math.fsum(1 - gap.confidence for gap in against)):.7g}"
    if len(against) > 1:
        return f"all others ({confidence})"
    ratio = "" if against[0].ratio is None else f"ratio {against[0].ratio}, "
    return f"{against[0].second} ({ratio}{confidence})"


def _doubts(gaps: Sequence[Difference]) -> list[str]:
    """Pairs without a winner, in words; those with the same remedy together."""
    reasons = {
        Verdict.IDENTICAL: "Identical weights, a difference of exactly 0",
        Verdict.TIE: "Tie, because the interval of the difference contains 0",
        Verdict.NOT_DECIDED: "Not decided",
    }
    sentences = []
    for verdict, reason in reasons.items():
        groups: dict[str, list[str]] = {}
        for gap in gaps:
            if gap.verdict is verdict:
                groups.setdefault(gap.remedy, []).append(f"{gap.first} and {gap.second}")
        listed = [
            f"{render.leading(pairs, LISTED, 'more pairs')}{f' ({remedy})' if remedy else ''}"
            for remedy, pairs in groups.items()
        ]
        if listed:
            sentences.append(f"{reason}: {'; '.join(listed)}.")
    return sentences


def _range(numbers: Sequence[str]) -> str:
    """The range of some numbers, given as texts.

    >>> _range(["2e-09", "8e-06", "2e-09"])
    '2e-09 to 8e-06'
    """
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low} to {high}"
