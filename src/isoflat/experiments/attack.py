"""Attacks on numbers by copies of a network with other weights and the same function: how far does a number move?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.estimate import Estimate, Kind
from isoflat.core.plain import attributes, json_numbers, plain
from isoflat.core.record import Record
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.core.table import Table
from isoflat.experiments.numbers import GEOMETRIES, MEASURES
from isoflat.experiments.progress import Report, bar
from isoflat.measurement.groups import symmetries_of
from isoflat.measurement.run import measure_all
from isoflat.measurement.subject import subject
from isoflat.measures.catalogue import find_measure
from isoflat.measures.settings import Settings
from isoflat.symmetry.canonical.representative import install
from isoflat.symmetry.found import Found
from isoflat.symmetry.proof import TOLERANCE

SLACK = 1e-8
"""Relative change of a number in float64 that counts as rounding, beside the widths of its confidence intervals."""

STEP = 1 / 3
"""Spread of a step of the search, in units of that of a random copy: factors that add up stay within float64."""

Element = tuple[Tensor, ...]
"""Coordinates in each exact group: logarithms of factors, or shifts."""


@final
@dataclass(frozen=True)
class AttackPlan:
    """Settings of an attack.

    Attributes:
        measures: names of measures in the catalogue.
        geometries: names of geometries in the catalogue.
        points: number of random copies.
        search: number of steps that try to move each number further.
        spread: standard deviation of the logarithms of the factors.
        seed: seed of all random numbers.
        settings: further settings of `measure_all`.
    """

    measures: tuple[str, ...] = MEASURES
    geometries: tuple[str, ...] = GEOMETRIES
    points: int = 5
    search: int = 10
    spread: float = 3.0
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an attack that does nothing."""
        if min(self.points, self.search) < 0 or self.points + self.search == 0:
            raise UsageError(
                f"expected at least one random point or search step, got {self.points} points and {self.search} steps"
            )
        if not 0 < self.spread < math.inf:
            raise UsageError(f"spread must be a positive number (3 is usual), got {self.spread}")

    @property
    def work(self) -> int:
        """Number of networks that are measured."""
        single = [find_measure(name).geometry is not None for name in set(self.measures)]
        rows = sum(1 if alone else len(set(self.geometries)) for alone in single)
        return 1 + self.points + rows * self.search


@final
@dataclass(frozen=True)
class Twin:
    """A copy of the attacked network, with other weights and the same function.

    Attributes:
        label: name that says how the copy was found, such as "random copy 1".
        output_change: largest change of an output on the traced rows, relative to the largest output.
        loss_change: relative change of the loss on all the data; None where the copy was not measured.
        estimates: one for each attacked number, in order; empty where the copy was not measured.
        refused: reason why the copy was not measured; empty where it was.
    """

    label: str
    output_change: float
    loss_change: float | None = None
    estimates: tuple[Estimate, ...] = ()
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**attributes(self), **json_numbers(self, "output_change", "loss_change")}


@final
@dataclass(frozen=True)
class AttackedNumber:
    """The outcome of an attack for one number.

    Attributes:
        before: record at the weights as given, in float64.
        lowest: lowest value seen, that at the weights as given included.
        highest: highest value seen, that at the weights as given included.
        drift: largest `|value − before| / |before|`; absolute where the value before is zero.
        worst: label of the copy with the largest drift, or with one beyond its tolerance.
        tolerance: drift of that copy that rounding and the relative widths of confidence intervals explain.
        survives: whether the drift of every copy is within its tolerance.
    """

    before: Record
    lowest: float
    highest: float
    drift: float
    worst: str
    tolerance: float
    survives: bool

    @property
    def name(self) -> str:
        """Name of the number: measure and geometry."""
        return f"{self.before.measure} ({self.before.geometry})"

    @property
    def deviation(self) -> float:
        """Largest distance of a value from that at the weights as given."""
        value = self.before.estimate.value
        return max(self.highest - value, value - self.lowest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            **attributes(self.before, "measure", "geometry"),
            **attributes(self),
            **json_numbers(self, "drift", "tolerance"),
        }


@final
@dataclass(frozen=True)
class AttackResult:
    """The outcome of an attack for all numbers.

    Attributes:
        plan: settings of the attack.
        dimension: dimension of the exact groups that were used.
        group_hash: hash of the group.
        blind: whether a constant added to all scores, which the loss ignores, does not count as a change of outputs.
        rows: one for each number.
        twins: every copy, in order.
    """

    plan: AttackPlan
    dimension: int
    group_hash: str
    blind: bool
    rows: tuple[AttackedNumber, ...]
    twins: tuple[Twin, ...]

    @property
    def measured(self) -> tuple[Twin, ...]:
        """Copies that were measured."""
        return tuple(twin for twin in self.twins if not twin.refused)

    @property
    def refused(self) -> tuple[Twin, ...]:
        """Copies that were not measured."""
        return tuple(twin for twin in self.twins if twin.refused)

    @property
    def output_change(self) -> float:
        """Largest change of an output over all measured copies, relative to the largest output."""
        return max(twin.output_change for twin in self.measured)

    @property
    def loss_change(self) -> float:
        """Largest relative change of the loss over all measured copies."""
        return max(twin.loss_change or 0.0 for twin in self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            **attributes(self.plan, "points", "search", "spread", "seed"),
            **attributes(self, "dimension", "group_hash"),
            "loss_ignores_common_score": self.blind,
            **attributes(self, "output_change", "loss_change", "rows"),
            "copies": plain(self.twins),
        }


def attack(  # noqa: PLR0913
    model: nn.Module,
    data: Any,
    loss: Any = None,
    *,
    measures: Sequence[str] = MEASURES,
    geometry: Sequence[str] = GEOMETRIES,
    points: int = 5,
    search: int = 10,
    spread: float = 3.0,
    seed: int = 0,
    symmetries: Found | None = None,
    progress: bool = False,
    **settings: Any,
) -> AttackResult:
    """Measure a network and copies of it with the same function, in float64, and see which numbers survive.

    Random copies come first. Then each number is searched for by itself, from the copy that moved it furthest so far:
    a random step is kept where the number moves further. Every copy counts for every number. The model is not changed.

    Args:
        model: the network.
        data: inputs and targets, or batches of them, as for `isoflat.measure`.
        loss: loss function, as for `isoflat.measure`.
        measures: names of measures in the catalogue.
        geometry: names of geometries in the catalogue.
        points: number of random copies.
        search: number of steps that try to move each number further.
        spread: standard deviation of the logarithms of the factors.
        seed: seed of all random numbers.
        symmetries: the network's symmetries; None to find and prove them.
        progress: whether a line of progress is shown on the standard error.
        **settings: further settings of `isoflat.measure_all`: `params`, `device`, `rtol`, `confidence`, `certify`, `probes`,
            `budget`.

    Raises:
        UsageError: there is nothing to attack with, or no copy could be measured.
        IsoflatError: the network cannot be measured as it is given.

    >>> from isoflat.experiments.families import mlp
    >>> data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    >>> net = mlp.build((3, 4, 2), bias=False, seed=0).eval()
    >>> found = attack(net, data, nn.CrossEntropyLoss(), geometry=["auto"], points=1, search=0)
    >>> [(row.before.measure, row.survives) for row in found.rows]
    [('quotient_spectral_norm', True), ('hessian_spectral_norm', False)]
    """
    plan = AttackPlan(tuple(measures), tuple(geometry), points, search, spread, seed, settings)
    found = symmetries
    if found is None:
        found = symmetries_of(
            subject(model, data, loss, Settings(params=settings.get("params"), device=settings.get("device")))
        )
    if not found.dimension:
        raise UsageError(
            "no change of these weights that keeps the function was found, so that there is nothing to attack with: "
            "isoflat symmetries says what fixes them"
        )
    with bar(plan.work, not progress) as line:
        hunt = _Hunt(copy.deepcopy(model).double(), data, loss, found, plan, line)
        for k in range(points):
            hunt.visit(f"random copy {k + 1}", found.element(stream(seed, "orbit", k), spread))
        for row, record in enumerate(hunt.before):
            name = f"{record.measure} ({record.geometry})"
            for step in range(search):
                move = found.element(stream(seed, "search", name, step), STEP * spread)
                element = tuple(a + b for a, b in zip(hunt.furthest(row), move, strict=True))
                hunt.visit(f"search for {name}, step {step + 1}", element)
    twins = tuple(twin for twin, _ in hunt.visited)
    if all(twin.refused for twin in twins):
        raise UsageError(f"none of {len(twins)} copies could be measured ({twins[0].refused}): try a smaller spread")
    rows = tuple(_row(record, row, twins) for row, record in enumerate(hunt.before))
    return AttackResult(plan, found.dimension, found.hash, found.blind, rows, twins)


class _Hunt:
    """Copies measured so far, with the elements that lead to them."""

    def __init__(self, twin: nn.Module, data: Any, loss: Any, found: Found, plan: AttackPlan, report: Report) -> None:
        self._twin, self._data, self._loss = twin, data, loss
        self._found, self._plan, self._report = found, plan, report
        self._done = 0.0
        self._state = found.state(twin)
        self._outputs = found.output(self._state)
        self.before = self._measured("as given", self._state)
        self.visited: list[tuple[Twin, Element]] = []

    def visit(self, label: str, element: Element) -> None:
        """Measure the copy that a group element leads to; where its outputs or its numbers fail, say why."""
        state = self._found.act(self._state, element)
        size = float(self._outputs.abs().max())
        change = float((self._found.output(state) - self._outputs).abs().max()) / (size or 1.0)
        if not change <= TOLERANCE:
            self._tell(label)
            reason = f"rounding changed its outputs by {change:.0e} of the largest (allowed: {TOLERANCE:g})"
            self.visited.append((Twin(label, change, refused=reason), element))
            return
        try:
            table = self._measured(label, state)
        except IsoflatError as error:
            self.visited.append((Twin(label, change, refused=str(error)), element))
            return
        old, new = self.before[0].point.loss, table[0].point.loss
        estimates = tuple(record.estimate for record in table)
        self.visited.append((Twin(label, change, abs(new - old) / (abs(old) or 1.0), estimates), element))

    def _tell(self, label: str) -> None:
        self._report(label, self._done)  # told before each network is measured: nothing is done at the first
        self._done = 1.0

    def furthest(self, row: int) -> Element:
        """The element that moved a number furthest so far; the identity where none did."""
        identity = tuple(torch.zeros(group.dimension, dtype=torch.float64) for group in self._found.symmetries)
        start = self.before[row].estimate.value
        best, chosen = 0.0, identity
        for twin, element in self.visited:
            far = 0.0 if twin.refused else _distance(start, twin.estimates[row].value)
            if far > best:
                best, chosen = far, element
        return chosen

    def _measured(self, label: str, state: State) -> Table:
        self._tell(label)
        return measure_all(
            install(self._twin, state),
            self._data,
            self._loss,
            measures=self._plan.measures,
            geometry=self._plan.geometries,
            seed=self._plan.seed,
            **self._plan.settings,
        )


def _row(record: Record, row: int, twins: Sequence[Twin]) -> AttackedNumber:
    """The range of one number over all copies, and the copy that speaks most against its invariance."""
    before = record.estimate
    seen = [(twin.label, twin.estimates[row]) for twin in twins if not twin.refused]
    values = [before.value, *(after.value for _, after in seen)]
    size = abs(before.value) or 1.0

    def doubts() -> Iterator[tuple[bool, float, float, str]]:
        for label, after in seen:
            drift, allowed = abs(after.value - before.value) / size, _width(before) + _width(after) + SLACK
            yield drift > allowed, drift, allowed, label

    moved, drift, allowed, label = max(doubts(), key=lambda doubt: doubt[:2])
    return AttackedNumber(record, min(values), max(values), drift, label, allowed, not moved)


def _width(estimate: Estimate) -> float:
    """Share of its value that an estimate leaves open."""
    if estimate.kind is Kind.UNCERTIFIED:  # its interval is open above: only the residual tells
        return (estimate.residual or 0.0) / (abs(estimate.value) or 1.0)
    return (estimate.upper - estimate.lower) / (abs(estimate.value) or 1.0)


def _distance(before: float, after: float) -> float:
    """`|log(after/before)|`; infinite across zero."""
    if before == 0:
        return abs(after)
    return abs(math.log(after / before)) if after / before > 0 else math.inf
