"""Reproductions and studies, put together again from their stored results and the cells and numbers beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar, final

import torch
from pydantic import Field

from isoflat.core.errors import DataError
from isoflat.core.plain import adapter
from isoflat.core.record import Record
from isoflat.core.table import Omission, Table
from isoflat.experiments import cells, checking
from isoflat.experiments.cells import MeasuredNetwork, NetworkTask
from isoflat.experiments.data import Split
from isoflat.experiments.numbers import Number, flat_row
from isoflat.experiments.prediction import FACTOR, NOTE, Facts, ObservedNetwork, Prediction
from isoflat.experiments.recipe import NumberSpec, Recipe
from isoflat.experiments.reproduction import Reproduction
from isoflat.experiments.results import MALFORMED, checked, why
from isoflat.experiments.statistics.sample import Level
from isoflat.experiments.store import Artifact
from isoflat.io.strict import canonical_json

Findings = TypeVar("Findings", Reproduction, Prediction)

Draws = Annotated[int, Field(ge=1, le=1_000_000)]
"""Number of resamples and permutations, within what is computed anew."""

_TextRows = list[dict[str, str]]

NAMED = 6
"""Number of missing networks that are named."""

_UNKNOWN = {"training": {"data_hash", "versions"}, "measurement": {"of", "versions"}}
"""Settings of cells that a recipe does not decide."""


@final
@dataclass(frozen=True)
class Rebuilt(Generic[Findings]):
    """A reproduction or a study that was put together again from stored numbers.

    Attributes:
        result: the findings; None where the stored numbers do not suffice.
        warnings: sentences that say what is missing, or differs from the stored result.
    """

    result: Findings | None
    warnings: tuple[str, ...]


def rebuild_reproduction(content: Mapping[str, Any], store: Sequence[Artifact]) -> Rebuilt[Reproduction]:
    """A reproduction from its result and its store.

    Networks are found in the store by their settings; where several versions trained them, the result says which.

    Args:
        content: content of the result.json of `isoflat reproduce`.
        store: cells of the store beside it.
    """
    try:
        recipe = checking.stored_recipe(content, None)
        numbers = tuple(quantity.number for quantity in recipe.numbers)
        seconds = float(content.get("seconds", 0.0))
        told = [row for row in content["networks"] if isinstance(row, dict)]
    except MALFORMED as error:
        return Rebuilt(None, (f"The result of the experiment is refused: {why(error)}",))
    empty = Reproduction(recipe, str(content["data"]), numbers, (), seconds)
    networks: dict[tuple[int, int], MeasuredNetwork] = {}
    agreeing: set[tuple[int, int]] = set()
    warnings = []
    for task, trained, measured in _pairs(recipe, numbers, store):
        try:
            network = _sound(cells.assembled(task, trained, measured), numbers)
        except MALFORMED as error:
            places = trained.address if measured is None else f"{trained.address} and {measured.address}"
            warnings.append(f"{task.label}: cells {places} are refused: {why(error)}")
            continue
        place = (task.replicate, recipe.arms.index(task.arm))
        agrees = all(row in told for row in replace(empty, networks=(network,)).rows())
        if place not in networks or (agrees and place not in agreeing):
            networks[place] = network
        if agrees:
            agreeing.add(place)
    found = tuple(network for _, network in sorted(networks.items()))
    warnings += _differences(recipe, networks, agreeing)
    return Rebuilt(replace(empty, networks=found) if found else None, tuple(warnings))


def _pairs(
    recipe: Recipe, numbers: Sequence[Number], store: Sequence[Artifact]
) -> Iterator[tuple[NetworkTask, Artifact, Artifact | None]]:
    """Training and measurement cells of each network, found by their settings; no measurement where training diverged."""
    nothing = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    data = Split("", nothing, nothing)  # its hash is the one thing that is asked of it, and is not compared
    arms = {arm.name: arm for arm in recipe.arms}
    measured: dict[Any, list[Artifact]] = {}
    for cell in store:
        if cell.settings.get("kind") == "measurement":
            measured.setdefault(cell.settings.get("of"), []).append(cell)
    for cell in store:
        arm, replicate = arms.get(str(cell.settings.get("arm"))), cell.settings.get("replicate")
        if arm is None or not isinstance(replicate, int) or not 0 <= replicate < recipe.replicates:
            continue
        task = NetworkTask(recipe, arm, replicate)
        if _same(cell.settings, task.training(data)):
            if "diverged" in cell.result:
                yield task, cell, None
            for other in measured.get(cell.address, ()):
                if _same(other.settings, task.measurement(data, numbers)):
                    yield task, cell, other


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    unknown = _UNKNOWN[wanted["kind"]]
    known = [{key: value for key, value in each.items() if key not in unknown} for each in (found, wanted)]
    return canonical_json(known[0], "settings") == canonical_json(known[1], "settings")


def _sound(network: MeasuredNetwork, numbers: Sequence[Number]) -> MeasuredNetwork:
    """The network, after every part of it was checked.

    Raises:
        ValueError: a part is of the wrong type, or there is neither a number nor a reason why there is none.
    """

    def sound(table: Table) -> Table:
        made = replace(table, rows=tuple(checked(row) for row in table))
        if not made.omitted and all(number.find(made) is None for number in numbers):
            raise DataError("none of its numbers is there")
        return made

    if network.diverged:
        return network
    return replace(network, table=sound(network.table), moved=tuple(map(sound, network.moved)))


def _differences(
    recipe: Recipe, networks: Mapping[tuple[int, int], MeasuredNetwork], agreeing: set[tuple[int, int]]
) -> Iterator[str]:
    missing = len(recipe.arms) * recipe.replicates - len(networks)
    if missing:
        places = ((replicate, arm) for replicate in range(recipe.replicates) for arm in range(len(recipe.arms)))
        gone = (f"{recipe.arms[arm].name} {replicate}" for replicate, arm in places if (replicate, arm) not in networks)
        named = [name for name, _ in zip(gone, range(NAMED), strict=False)]
        more = ", …" if missing > len(named) else ""
        yield (
            f"{missing} of {len(recipe.arms) * recipe.replicates} networks are not in the store, whole and readable, and are "
            f"left out: {', '.join(named)}{more}. The same isoflat reproduce computes what is missing."
        )
    if other := [network.label for place, network in networks.items() if place not in agreeing]:
        yield f"result.json tells other numbers than the store, which is believed: {', '.join(other[:NAMED])}."


def _facts(told: Mapping[str, Any]) -> Facts:
    """Facts of a study from the `subject` of its result."""
    named = ((name.replace("_", " ").capitalize(), value) for name, value in told.items() if name != "notes")
    return _of(Facts, (*named, *((NOTE, text) for text in told.get("notes", ()))))


def rebuild_study(content: Mapping[str, Any], records: Sequence[Record]) -> Rebuilt[Prediction]:
    """A study from its result and its numbers.

    Statistics are computed anew from the numbers; drawn with the same seed, they come out the same.

    Args:
        content: content of the result.json of `isoflat study`.
        records: every number in its folder.
    """
    try:
        result = replace(_prediction(content, records), facts=_facts(content.get("subject", {})))
        told = tuple(content["sentences"])
    except MALFORMED as error:
        return Rebuilt(None, (f"The study of result.json is shown by its sentences and numbers only: {why(error)}",))
    same = result.sentences == told
    changed = "result.json says other sentences than its numbers, which are believed."
    return Rebuilt(result, () if same else (changed,))


def _prediction(content: Mapping[str, Any], records: Sequence[Record]) -> Prediction:
    rows = _of(list[dict[str, Any]], content["networks"])
    omitted = tuple(Omission(**part) for part in _of(_TextRows, content["omitted"]))
    known: dict[tuple[str, str, str, str], Record] = {}
    for record in records:
        known.setdefault((record.label, *_key(flat_row(record))), record)
    numbers: dict[tuple[str, str, str], Number] = {}
    networks: dict[str, list[tuple[dict[str, Any], Record]]] = {}
    for row in rows:
        key = _key(row)
        record = known.get((row["label"], *key))
        if record is None or any(row.get(name) != value for name, value in flat_row(record).items()):
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
        left_out=tuple((part["label"], part["reason"]) for part in _of(_TextRows, content["left_out"])),
        draws=_of(Draws, content["draws"]),
    )


def _network(label: str, told: Sequence[tuple[dict[str, Any], Record]], omitted: Sequence[Omission]) -> ObservedNetwork:
    first = told[0][0]
    return ObservedNetwork(
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


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["measure"], row["geometry"], row["logits"]


def _number(measure: str, geometry: str, logits: str) -> Number:
    return NumberSpec(measure=measure, geometry=geometry, logits=None if logits == "raw" else logits).number


def _of(kind: Any, value: Any) -> Any:
    """The value, if it is of a type.

    Raises:
        ValueError: the value is of another type.
    """
    return adapter(kind).validate_python(value, strict=True)
