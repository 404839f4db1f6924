"""A study, put together again from its result and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

from pydantic import Field, TypeAdapter

from isoflat.core.errors import DataError
from isoflat.core.record import Record
from isoflat.core.table import Omission, Table
from isoflat.experiments.numbers import Number
from isoflat.experiments.prediction import Observed, Prediction, flat
from isoflat.experiments.recipe import Quantity
from isoflat.experiments.results import MALFORMED, why
from isoflat.experiments.statistics.sample import Level
from isoflat.report.pages.study import NOTE, Facts

FACTOR = "factor."
"""Before the name of a hyper-parameter, in rows."""

Draws = Annotated[int, Field(ge=1, le=1_000_000)]
"""Resamples and permutations that are computed anew."""

_Pairs = list[dict[str, str]]


@final
@dataclass(frozen=True)
class Restudied:
    """A study without its data and weights.

    Attributes:
        result: what its networks say; None where it cannot be put together.
        facts: what was studied.
        warnings: why not, or what comes out otherwise than it was told.
    """

    result: Prediction | None
    facts: Facts
    warnings: tuple[str, ...]


def _facts(told: Mapping[str, Any]) -> Facts:
    """The facts of a `subject`."""
    named = ((name.replace("_", " ").capitalize(), value) for name, value in told.items() if name != "notes")
    return _of(Facts, (*named, *((NOTE, text) for text in told.get("notes", ()))))


def rebuild(content: Mapping[str, Any], records: Sequence[Record]) -> Restudied:
    """Statistics are computed anew from the numbers; drawn with the same seed, they come out the same.

    Args:
        content: of the result.json of `isoflat study`.
        records: every number in its folder.
    """
    try:
        result, facts = _prediction(content, records), _facts(content.get("subject", {}))
        told = tuple(content["sentences"])
    except MALFORMED as error:
        return Restudied(
            None, (), (f"The study of result.json is shown by its sentences and numbers only: {why(error)}",)
        )
    same = result.sentences == told
    changed = "result.json says other sentences than its numbers, which are believed."
    return Restudied(result, facts, () if same else (changed,))


def _prediction(content: Mapping[str, Any], records: Sequence[Record]) -> Prediction:
    rows, omitted = _of(list[dict[str, Any]], content["networks"]), _omitted(content)
    known: dict[tuple[str, str, str, str], Record] = {}
    for record in records:
        known.setdefault((record.label, *_key(flat(record))), record)
    numbers: dict[tuple[str, str, str], Number] = {}
    networks: dict[str, list[tuple[dict[str, Any], Record]]] = {}
    for row in rows:
        key = _key(row)
        record = known.get((row["label"], *key))
        if record is None or any(row.get(name) != value for name, value in flat(record).items()):
            raise DataError(
                f"{row['measure']} of {row['label']} is not among the numbers of the folder, or is another there"
            )
        numbers.setdefault(key, _number(*key))
        networks.setdefault(row["label"], []).append((row, record))
    order = list(_of(dict[str, str], content["numbers"]))
    found = {number.name: number for number in numbers.values()}
    found |= {n.name: n for part in omitted if (n := _number(part.measure, part.geometry, "raw")).name in order}
    return Prediction(
        numbers=tuple(found[name] for name in order),
        networks=tuple(_network(label, told, omitted) for label, told in networks.items()),
        outcome=_of(str, content["outcome"]),
        seed=_of(int, content["seed"]),
        left_out=tuple((part["label"], part["reason"]) for part in _of(_Pairs, content["left_out"])),
        draws=_of(Draws, content["draws"]),
    )


def _network(label: str, told: Sequence[tuple[dict[str, Any], Record]], omitted: Sequence[Omission]) -> Observed:
    first = told[0][0]
    return Observed(
        label,
        Table(tuple(record for _, record in told), tuple(part for part in omitted if part.label == label)),
        _of(float, first["outcome"]),
        _of(float, first["training_loss"]),
        {name.removeprefix(FACTOR): _level(level) for name, level in first.items() if name.startswith(FACTOR)},
    )


def _level(value: Any) -> Level:
    """A value of a hyper-parameter; whole numbers stay whole."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"a hyper-parameter is a number or a word, not {value!r}")
    return value


def _omitted(content: Mapping[str, Any]) -> tuple[Omission, ...]:
    return tuple(Omission(**part) for part in _of(_Pairs, content["omitted"]))


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["measure"], row["geometry"], row["logits"]


def _number(measure: str, geometry: str, logits: str) -> Number:
    return Quantity(measure=measure, geometry=geometry, logits=None if logits == "raw" else logits).number


def _of(kind: Any, value: Any) -> Any:
    """The value, if it is of its kind.

    Raises:
        ValueError: it is not.
    """
    return TypeAdapter(kind).validate_python(value, strict=True)
