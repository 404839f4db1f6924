"""Lists of trained networks and how well they generalize, as CSV or TOML; and the numbers of these networks."""

from __future__ import annotations

import csv
import inspect
import io
import math
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch

from isoflat.core.errors import CheckpointError, DataError, IsoflatError, UnknownName, UsageError
from isoflat.core.render import some
from isoflat.core.state import fingerprint
from isoflat.core.table import Table
from isoflat.experiments.numbers import Number
from isoflat.experiments.statistics.sample import LEAST, Level
from isoflat.experiments.store import Store, address
from isoflat.experiments.sweep import PAUSE
from isoflat.io.inputs import Inputs, try_forward, within_memory
from isoflat.io.model import build, find_loss
from isoflat.measurement.run import measure_all
from isoflat.measurement.subject import subject
from isoflat.measures.catalogue import find_geometry, find_measure
from isoflat.measures.settings import Budget, Settings
from isoflat.risk.batches import Batches, digest
from isoflat.symmetry.found import VERSION as RULES

OUTCOMES = {
    "gap": "generalisation gap",
    "test_error": "test error",
    "test_accuracy": "test error",
    "test_loss": "test loss",
}
"""Columns that hold an outcome, with its name in words; an accuracy is turned into an error."""

REPLICATES = ("seed", "replicate")
"""Columns that tell replicates apart: networks alike in everything else are replicates of each other."""

_KNOWN = ("weights", "label", "train_loss", *OUTCOMES, *REPLICATES)


@final
@dataclass(frozen=True)
class ListedNetwork:
    """A network of a list.

    Attributes:
        place: position in the list, for messages: "row 3 (runs/a.pt)".
        weights: path of the weights file.
        label: name of the network; empty where the list does not give one.
        outcome: value of the outcome; larger is worse.
        loss: training loss; None where the list does not give it.
        factors: values of hyper-parameters by name.
    """

    place: str
    weights: Path
    label: str
    outcome: float
    loss: float | None
    factors: Mapping[str, Level] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Listing:
    """A list of networks.

    Attributes:
        rows: networks whose rows can be read.
        column: name of the column with the outcome.
        problems: faults of the other rows, each in a line that names the row.
    """

    rows: tuple[ListedNetwork, ...]
    column: str
    problems: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Name of the outcome in words."""
        return OUTCOMES[self.column]


def read_listing(path: Path, outcome: str | None = None) -> Listing:
    """Networks from a file: a CSV with a head, or a TOML of `[[networks]]`.

    Args:
        path: path of the list; paths of weights are relative to its folder.
        outcome: column to predict, where there are several; None for the only one.

    Raises:
        DataError: the file is missing, damaged or of another kind, or a column is missing.
        UsageError: it is not clear which outcome is meant, or there are too few networks.
    """
    columns, table = _table(path)
    if "weights" not in columns:
        raise DataError(
            f"--networks {path}: there is no column weights, which names the files; there are {some(columns)}"
        )
    column = _outcome(path, columns, outcome)
    if len(table) < LEAST:
        raise UsageError(f"--networks {path}: a relation needs at least {LEAST} networks, the list has {len(table)}")
    factors = [name for name in columns if name not in _KNOWN]
    rows, problems = [], []
    for number, cells in enumerate(table, start=1):
        try:
            rows.append(_row(f"row {number}", path.parent, cells, column, factors, "train_loss" in columns))
        except DataError as error:
            problems.append(str(error))
    return Listing(tuple(rows), column, tuple(problems))


def _table(path: Path) -> tuple[list[str], list[dict[str, Any] | None]]:
    """Names of the columns, and the cells of each row by column; None for a row of another length."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--networks {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--networks {path} is no text in UTF-8 ({error.reason}): save it as CSV or TOML") from error
    if path.suffix == ".toml":
        return _toml(path, text)
    if path.suffix == ".csv":
        return _csv(path, text)
    raise DataError(f"--networks {path}: unknown kind of list {path.suffix!r}; expected .csv or .toml")


def _toml(path: Path, text: str) -> tuple[list[str], list[dict[str, Any] | None]]:
    try:
        tables = tomllib.loads(text).get("networks")
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"--networks {path} is no TOML: {error}") from error
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise DataError(f"--networks {path}: expected a table [[networks]] for each network")
    return list(dict.fromkeys(name for table in tables for name in table)), list(tables)


def _csv(path: Path, text: str) -> tuple[list[str], list[dict[str, Any] | None]]:
    try:
        lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as error:
        raise DataError(f"--networks {path} is no CSV: {error}") from error
    head, *body = lines or [[]]
    if not all(head) or len(set(head)) < len(head):
        raise DataError(f"--networks {path}: every column needs a name of its own, got {some(head)}")
    return head, [dict(zip(head, line, strict=True)) if len(line) == len(head) else None for line in body]


def _outcome(path: Path, columns: list[str], wanted: str | None) -> str:
    if wanted is not None and wanted not in OUTCOMES:
        raise UnknownName("outcome", wanted, OUTCOMES)
    there = [name for name in OUTCOMES if name in columns]
    if not there or wanted not in (None, *there):
        raise DataError(
            f"--networks {path}: there is no column {wanted or ', '.join(OUTCOMES)} to predict; there are {some(columns)}"
        )
    if wanted is None and len(there) > 1:
        raise UsageError(f"--networks {path} has the outcomes {', '.join(there)}: choose one with --outcome")
    return wanted or there[0]


def _row(
    place: str, folder: Path, cells: Mapping[str, Any] | None, column: str, factors: list[str], losses: bool
) -> ListedNetwork:
    if cells is None:
        raise DataError(f"{place} has more or fewer cells than there are columns")
    weights = cells.get("weights")
    if not isinstance(weights, str) or not weights:
        raise DataError(f"{place} names no file in the column weights, got {weights!r}")
    place = f"{place} ({weights})"
    outcome = _number(place, column, cells)
    if column == "test_accuracy":
        if not 0 <= outcome <= 1:
            raise DataError(f"{place}: test_accuracy is a share between 0 and 1, got {outcome:g}")
        outcome = 1 - outcome
    loss = _number(place, "train_loss", cells) if losses else None
    levels = {name: _level(cells.get(name)) for name in factors}
    return ListedNetwork(place, folder / weights, str(cells.get("label", "")), outcome, loss, levels)


def _number(place: str, column: str, cells: Mapping[str, Any]) -> float:
    value = cells.get(column)
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        told = "nothing" if value in (None, "") else repr(value)
        raise DataError(f"{place}: expected a finite number in the column {column}, got {told}")
    return number


def _level(value: Any) -> Level:
    """The value of a cell as a level: a number where it is one, or a text; an empty cell is the level "none".

    >>> [_level(value) for value in ("16", 16.0, "1e-3", "sgd", "", True, "nan", [8, 8])]
    [16, 16, 0.001, 'sgd', 'none', 'true', 'nan', '8-8']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "-".join(map(str, value))
    if value in (None, ""):
        return "none"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)
    return whole(number) if math.isfinite(number) else str(value)


def whole(number: float) -> float:
    """The number as an int where it is a whole one."""
    return int(number) if number.is_integer() and abs(number) < 1 << 53 else number


@final
@dataclass(frozen=True)
class ListedPlan:
    """Settings with which networks of a list are measured.

    Attributes:
        inputs: names of model, data and loss, and how they are read.
        numbers: numbers that are measured.
        settings: `rtol`, `probes`, `seed`, `check`, `params` and `dtype`, as for `isoflat.measure_all`.
        products: largest number of Hessian-vector products per eigenvalue.
        device: device that networks are measured on; None for where they are built.
    """

    inputs: Inputs
    numbers: tuple[Number, ...]
    settings: Mapping[str, Any]
    products: int
    device: torch.device | None = None

    @property
    def seen(self) -> Settings:
        """Settings that decide which parameters are measured, in which precision, and on which device."""
        return Settings(params=self.settings["params"], dtype=self.settings["dtype"], device=self.device)

    def table(self, model: torch.nn.Module, batches: Batches, label: str) -> Table:
        """Every number of one network.

        Raises:
            IsoflatError: the network cannot be measured, or none of the numbers applies.
        """
        with within_memory():
            table = measure_all(
                model,
                batches,
                find_loss(self.inputs.loss),
                measures=list(dict.fromkeys(number.measure for number in self.numbers)),
                geometry=list(dict.fromkeys(number.geometry for number in self.numbers)),
                budget=Budget(self.products),
                device=self.device,
                label=label,
                **self.settings,
            )
        return table.only({(number.measure, number.geometry) for number in self.numbers})


@final
@dataclass(frozen=True)
class ReadyNetwork:
    """A network of a list that was opened and can be measured.

    Attributes:
        row: the network's row of the list.
        cell: settings of its cell in the store: everything that its numbers depend on.
    """

    row: ListedNetwork
    cell: dict[str, Any]


def ready(listing: Listing, plan: ListedPlan) -> tuple[tuple[ReadyNetwork, ...], Batches, tuple[str, ...]]:
    """Open and fit every network once, and read the data, before anything is measured.

    Returns:
        The networks, the data, and notes on what was chosen while loading.

    Raises:
        IsoflatError: model, data and loss do not fit together.
        CheckpointError: rows are bad; all of these are named.
    """
    inputs = plan.inputs
    loss, model = find_loss(inputs.loss), build(inputs.model, inputs.seed)
    notes: list[str] = []
    batches = inputs.read(notes.append)
    try_forward(subject(model, batches, loss, plan.seen))
    common = _common(plan, fingerprint(*map(digest, batches)))
    found, problems = [], list(listing.problems)
    seen: dict[str, str] = {}
    for row in listing.rows:
        try:
            own: list[str] = []
            model = replace(inputs, weights=row.weights).network(own.append)
            target = subject(model, batches, loss, plan.seen)
        except IsoflatError as error:
            problems.append(f"{row.place}: {error}")
            continue
        notes += own
        mark = target.state.fingerprint()
        if mark in seen:
            problems.append(f"{row.place} has the same weights as {seen[mark]}: every network counts once")
        seen.setdefault(mark, row.place)
        found.append(ReadyNetwork(row, {**common, "model_hash": mark, "structure": _structure(model)}))
    if problems:
        raise CheckpointError(f"{len(problems)} bad rows, nothing was measured: {'; '.join(problems)}")
    return tuple(found), batches, tuple(dict.fromkeys(notes))


def kept(network: ReadyNetwork, label: str, plan: ListedPlan, batches: Batches, store: Store) -> Table:
    """The numbers of one network, read from the store, or measured and kept there.

    Raises:
        IsoflatError: the network cannot be measured, or its cell is damaged.
    """
    where = address(network.cell)
    while True:
        with store.claim(where) as mine:
            cell = store.get(where)
            if cell is None and mine:
                model = replace(plan.inputs, weights=network.row.weights).network()
                table = plan.table(model, batches, label)
                cell = store.put(network.cell, {"table": table.to_dict()}, None)
        if cell is not None:
            table = Table.from_dict(cell.result["table"])
            return Table(
                tuple(replace(row, label=label) for row in table),
                tuple(replace(part, label=label) for part in table.omitted),
            )
        time.sleep(PAUSE)  # another process has the claim


def _common(plan: ListedPlan, data_hash: str) -> dict[str, Any]:
    """Settings that the numbers of all networks depend on."""
    entries = {number.measure: str(find_measure(number.measure).version) for number in plan.numbers}
    places = {number.geometry: str(find_geometry(number.geometry).version) for number in plan.numbers}
    return {
        "kind": "listed",
        "model": plan.inputs.model,
        "data_hash": data_hash,
        "loss": [plan.inputs.loss, _source(find_loss(plan.inputs.loss))],
        "numbers": [number.name for number in plan.numbers],
        "settings": {**plan.settings, "products": plan.products},
        "device": "cpu" if plan.device is None else plan.device.type,
        "versions": {
            "isoflat": version("isoflat"), "torch": torch.__version__, "rules": str(RULES), **entries, **places
        },
    }  # fmt: skip


def _structure(model: torch.nn.Module) -> str:
    """Hash of a network's modules: their names and arguments, and the code of those that do not come with torch."""
    parts = [f"{name} {type(part).__qualname__}({part.extra_repr()})" for name, part in model.named_modules()]
    kinds = dict.fromkeys(type(part) for part in model.modules())
    return fingerprint(*parts, *(_source(kind) for kind in kinds if not kind.__module__.startswith("torch.")))


def _source(code: type | Callable[..., Any] | None) -> str:
    """The text of a class or function; empty where there is none to read."""
    try:
        return "" if code is None else inspect.getsource(code if inspect.isroutine(code) else _kind(code))
    except (OSError, TypeError):  # written in C, or typed into a console: there is no source file
        return ""


def _kind(code: Any) -> type:
    return code if isinstance(code, type) else type(code)
