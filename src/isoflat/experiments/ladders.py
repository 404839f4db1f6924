"""Edits that keep a network's function, with growing amounts, and the flatness numbers after each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.plain import attributes
from isoflat.core.record import Record
from isoflat.core.render import rounded
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.experiments.numbers import GEOMETRIES, MEASURES, NUMBERS, Number
from isoflat.experiments.progress import Report, silent
from isoflat.geometry.canonical import GEOMETRY
from isoflat.measurement.run import measure_all
from isoflat.symmetry.canonical.representative import install
from isoflat.symmetry.finding.discover import symmetries
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.scaling import LayerScale

STILL = 1e-6
"""Relative change up to which a sentence says that a number stays."""


@final
@dataclass(frozen=True)
class Rung:
    """A network edited by one amount, and measured.

    Attributes:
        amount: strength of the edit, such as the factor by which weights were multiplied.
        output_change: largest change of an output on the training set, relative to the largest output.
        records: record of each number, by its name.
        changes: relative change of each number from the first rung, by its name.
    """

    amount: float
    output_change: float
    records: Mapping[str, Record]
    changes: Mapping[str, float]


@final
@dataclass(frozen=True)
class Ladder:
    """One kind of edit with growing amounts, measured in float64.

    Attributes:
        name: short name of the edit, which an amount can follow: "layers ×".
        title: heading that says what is edited.
        edit: beginning of a sentence that says what is edited; `{amount}` and `{label}` are filled in.
        how: exact description of the edit, for a caption.
        label: name of the network that is edited.
        verified: largest relative output change by random elements of its symmetries, before it was edited.
        rungs: the edited networks by growing amount; the first is the reference, where nothing is edited.
    """

    name: str
    title: str
    edit: str
    how: str
    label: str
    verified: float
    rungs: tuple[Rung, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """Record of every measured number."""
        return tuple(record for rung in self.rungs for record in rung.records.values())

    @property
    def sentence(self) -> str:
        """A sentence that says what the edit did."""
        last = self.rungs[-1]
        what = ", ".join(self._fate(number) for number in reversed(NUMBERS))
        edit = self.edit.format(amount=f"{last.amount:g}", label=self.label)
        return f"{edit} changes outputs by at most {last.output_change:.0e} of their size: {what}."

    def _fate(self, number: Number) -> str:
        first, last = (rung.records[number.name].estimate.value for rung in (self.rungs[0], self.rungs[-1]))
        change = self.rungs[-1].changes[number.name]
        if change <= STILL:
            return f"the {number.words} stays, to {change:.0e} of its value"
        return f"the {number.words} goes from {rounded(first)} to {rounded(last)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**attributes(self), "sentence": self.sentence}


@final
@dataclass(frozen=True)
class Victim:
    """A network to be edited, in float64, with its data and its symmetries proved.

    Attributes:
        model: a copy of the network.
        data: inputs and class targets; inputs are float64, or characters.
        label: name of the network.
        found: symmetries of the network.
        verified: largest relative output change when the symmetries were proved.
        aside: whether outputs are compared but for a constant on all scores of an example, which the loss ignores.
    """

    model: nn.Module
    data: tuple[Tensor, Tensor]
    label: str
    found: Found
    verified: float
    aside: bool = False

    @staticmethod
    def prepare(model: nn.Module, data: tuple[Tensor, Tensor], label: str, aside: bool = False) -> Victim:
        """A copy of a network in float64, traced and proved; the network itself is not changed.

        Args:
            model: the network.
            data: inputs and class targets.
            label: name of the network.
            aside: whether a constant on all scores of an example, which the loss ignores, is no change of outputs.

        Raises:
            SymmetryViolated: the symmetries that were found do not keep its outputs.
        """
        twin = copy.deepcopy(model).double().eval()
        precise = (data[0].double() if data[0].is_floating_point() else data[0], data[1])
        found = symmetries(twin, precise[0], loss=nn.CrossEntropyLoss(), verify=False)
        return Victim(twin, precise, label, found, found.verify(), aside and found.blind)

    def climb(
        self,
        ladder: tuple[str, str, str, str],
        amounts: Sequence[float],
        move: Callable[[State, float], State],
        seed: int,
        report: Report = silent,
    ) -> Ladder:
        """Edit the network by each amount, and measure it.

        Args:
            ladder: the fields `name`, `title`, `edit` and `how` of the ladder.
            amounts: strengths of the edit; the first is the reference.
            move: function that edits a state by an amount.
            seed: seed of the measurements.
            report: function that is told what is going on, a unit of work per rung.
        """
        state = self.found.state()
        before = self._outputs(self.model)
        rungs: list[Rung] = []
        for amount in amounts:
            report(f"attacking {self.label}, {ladder[0]} {amount:g}", 1.0)
            holder = install(self.model, move(state, amount))
            change = float((self._outputs(holder) - before).abs().max() / before.abs().max())
            records = self._measured(holder, f"{self.label}, {ladder[0]} {amount:g}", seed)
            start = rungs[0].records if rungs else records
            changes = {
                name: abs(record.estimate.value / start[name].estimate.value - 1) for name, record in records.items()
            }
            rungs.append(Rung(amount, change, records, changes))
        return Ladder(*ladder, self.label, self.verified, tuple(rungs))

    def _outputs(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            scores = model(self.data[0])
        return scores - scores.mean(1, keepdim=True) if self.aside else scores

    def _measured(self, model: nn.Module, label: str, seed: int) -> dict[str, Record]:
        known = GEOMETRY.on(replace(self.found, model=model))
        table = measure_all(
            model,
            self.data,
            nn.CrossEntropyLoss(),
            measures=MEASURES,
            geometry=[known if name == "auto" else name for name in GEOMETRIES],
            seed=seed,
            label=label,
        )
        return {number.name: number.of(table) for number in NUMBERS}


def rescale_layers(victim: Victim, factors: Sequence[float], seed: int, report: Report) -> Ladder:
    """Multiply the first layer of a feed-forward network by each factor, and divide the last layer by it."""
    chain = LayerScale.sequential(victim.found.state())
    inside = [1.0] * (chain.dimension - 1)
    words = (
        "layers ×",
        "Whole layers rescaled",
        "Rescaling whole layers of one network ({label}) by {amount}",
        "the first layer times the factor, the last layer divided by it",
    )
    return victim.climb(
        words, factors, lambda state, f: chain.act(state, chain.element(f, *inside, 1 / f)), seed, report
    )


def rescale_units(victim: Victim, factors: Sequence[float], seed: int, report: Report) -> Ladder:
    """Multiply or divide each unit of the first hidden layer by each factor, at random, and the next layer's columns inversely."""
    state = victim.found.state()
    first, second = LayerScale.sequential(state).weights[:2]
    units = state.tensors[first].shape[0]
    order = torch.randperm(units, generator=stream(seed, "units"))
    signs = torch.where(order < units / 2, 1.0, -1.0).double()

    def move(at: State, factor: float) -> State:
        factors = factor**signs
        return at.replace({first: at.tensors[first] * factors[:, None], second: at.tensors[second] / factors})

    words = (
        "units ×",
        "Single units rescaled",
        "Rescaling single units of the same network ({label}) by {amount}",
        "units of the first hidden layer times the factor or divided by it, the next layer inversely",
    )
    return victim.climb(words, factors, move, seed, report)


def shift_constants(
    victim: Victim, pairs: Sequence[tuple[str, str]], amounts: Sequence[float], seed: int, report: Report
) -> Ladder:
    """Add constants to biases before batch normalisation, and to the running means that take them away again.

    Args:
        victim: a network with batch normalisation.
        pairs: names of each bias and of the running mean of what it is added to.
        amounts: constants to add, with random signs; the first is zero.
        seed: seed of the signs and of the measurements.
        report: function that is told what is going on, a unit of work per amount.
    """

    def move(at: State, amount: float) -> State:
        changed = {}
        for bias, mean in pairs:
            draw = torch.randint(0, 2, at.tensors[bias].shape, generator=stream(seed, "shift", bias)).double() * 2 - 1
            changed |= {name: at.tensors[name] + amount * draw for name in (bias, mean)}
        return at.replace(changed)

    words = (
        "biases +",
        "Constants moved",
        "Adding ±{amount} to the biases of another network ({label}) and to the running means that take it away again",
        "± the amount added to every bias before a batch normalisation and to its running mean",
    )
    return victim.climb(words, amounts, move, seed, report)


def reparametrize_all(victim: Victim, spreads: Sequence[float], seed: int, report: Report) -> Ladder:
    """Apply a random element of every symmetry that was found, as `isoflat.reparametrize` draws it, at growing spreads.

    Args:
        victim: any network; its outputs are to be compared with what the loss ignores set aside.
        spreads: standard deviations of the logarithms of the factors; the first one is zero.
        seed: seed of the element and of the measurements.
        report: function that is told what is going on, a unit of work per spread.
    """
    groups = victim.found.dimension

    def move(at: State, spread: float) -> State:
        return victim.found.act(at, victim.found.element(stream(seed, "reparametrize"), spread, at))

    words = (
        "spread",
        "Every symmetry at once",
        f"A random element of the {groups}-dimensional symmetry group of {{label}} with spread {{amount}}",
        f"one random element of all {groups} dimensions of the group; the spread is the standard deviation of the "
        "logarithms of its factors",
    )
    return victim.climb(words, spreads, move, seed, report)
