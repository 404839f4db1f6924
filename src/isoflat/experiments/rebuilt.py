"""A reproduction, put together again from its result and its store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from pydantic import TypeAdapter

from isoflat.core.errors import DataError
from isoflat.core.table import Table
from isoflat.experiments import cells, checking
from isoflat.experiments.cells import Measured, Task
from isoflat.experiments.data import Split
from isoflat.experiments.loop import Training
from isoflat.experiments.numbers import Number
from isoflat.experiments.recipe import Recipe
from isoflat.experiments.reproduction import Reproduction
from isoflat.experiments.results import MALFORMED, checked, why
from isoflat.experiments.store import Cell
from isoflat.experiments.store.strict import canonical

NAMED = 6
"""Missing networks that are named."""

_UNKNOWN = {"training": {"data_hash", "versions"}, "measurement": {"of", "versions"}}
"""Settings of cells that a recipe does not decide."""


@final
@dataclass(frozen=True)
class Rebuilt:
    """A reproduction without its data.

    Attributes:
        result: what its networks say; None where none is in the store.
        warnings: what differs from the stored result.
    """

    result: Reproduction | None
    warnings: tuple[str, ...]


def rebuild(content: Mapping[str, Any], store: Sequence[Cell]) -> Rebuilt:
    """Networks are found in the store by their settings; where several versions trained them, the result says which.

    Args:
        content: of the result.json of `isoflat reproduce`.
        store: its cells.
    """
    try:
        recipe = checking.recipe(content, None)
        numbers = tuple(quantity.number for quantity in recipe.numbers)
        seconds = float(content.get("seconds", 0.0))
        told = [row for row in content["networks"] if isinstance(row, dict)]
    except MALFORMED as error:
        return Rebuilt(None, (f"The result of the experiment is refused: {why(error)}",))
    empty = Reproduction(recipe, str(content["data"]), numbers, (), seconds)
    networks: dict[tuple[int, int], Measured] = {}
    agreeing: set[tuple[int, int]] = set()
    warnings = []
    for task, trained, measured in _pairs(recipe, numbers, store):
        try:
            network = _sound(cells.read(task, trained, measured), numbers)
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
    recipe: Recipe, numbers: Sequence[Number], store: Sequence[Cell]
) -> Iterator[tuple[Task, Cell, Cell | None]]:
    """Cells of each network, by their settings; one where the training diverged."""
    nothing = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    data = Split("", nothing, nothing)  # its hash is the one thing that is asked of it, and is not compared
    arms = {arm.name: arm for arm in recipe.arms}
    measured: dict[Any, list[Cell]] = {}
    for cell in store:
        if cell.settings.get("kind") == "measurement":
            measured.setdefault(cell.settings.get("of"), []).append(cell)
    for cell in store:
        arm, replicate = arms.get(str(cell.settings.get("arm"))), cell.settings.get("replicate")
        if arm is None or not isinstance(replicate, int) or not 0 <= replicate < recipe.replicates:
            continue
        task = Task(recipe, arm, replicate)
        if _same(cell.settings, task.training(data)):
            if "diverged" in cell.result:
                yield task, cell, None
            for other in measured.get(cell.address, ()):
                if _same(other.settings, task.measurement(data, numbers)):
                    yield task, cell, other


def _same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    unknown = _UNKNOWN[wanted["kind"]]
    known = [{key: value for key, value in each.items() if key not in unknown} for each in (found, wanted)]
    return canonical(known[0], "settings") == canonical(known[1], "settings")


def _sound(network: Measured, numbers: Sequence[Number]) -> Measured:
    """The network, every part of which is of its kind.

    Raises:
        ValueError: one is not, or neither a number is there nor why there is none.
        KeyError: a record lacks a setting.
    """

    def sound(table: Table) -> Table:
        made = replace(table, rows=tuple(checked(row) for row in table))
        if not made.omitted and all(cells.found(made, number) is None for number in numbers):
            raise DataError("none of its numbers is there")
        return made

    if network.diverged:
        return replace(
            network,
            training=TypeAdapter(Training).validate_python(asdict(network.training)),
            seconds=TypeAdapter(float).validate_python(network.seconds),
            diverged=TypeAdapter(str).validate_python(network.diverged),
        )
    share = TypeAdapter(float | None)
    return replace(
        network,
        training=TypeAdapter(Training).validate_python(asdict(network.training)),
        train_error=TypeAdapter(float).validate_python(network.train_error),
        test_error=share.validate_python(network.test_error),
        test_loss=share.validate_python(network.test_loss),
        table=sound(network.table),
        moved=tuple(map(sound, network.moved)),
        seconds=TypeAdapter(float).validate_python(network.seconds),
    )


def _differences(
    recipe: Recipe, networks: Mapping[tuple[int, int], Measured], agreeing: set[tuple[int, int]]
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
