"""A demonstration: two ways of training, networks measured at one loss, edits of these, and the findings in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, final

from torch import nn

from isoflat.core.estimate import Estimate
from isoflat.core.plain import attributes, plain
from isoflat.core.record import Record
from isoflat.core.rng import stream
from isoflat.core.table import Table
from isoflat.experiments.data import Split
from isoflat.experiments.ladders import Ladder
from isoflat.experiments.loop import Regime, Training, accuracy, train
from isoflat.experiments.numbers import CANONICAL, GEOMETRIES, MEASURES, NUMBERS, Number
from isoflat.experiments.progress import Report, shares
from isoflat.experiments.verdict import GroupVerdict, compare
from isoflat.measurement.run import measure_all


class DemoPlan(Protocol):
    """Settings that every demonstration has; each has a frozen dataclass of its own."""

    @property
    def seeds(self) -> int:
        """Number of networks per arm."""
        ...

    @property
    def seed(self) -> int:
        """Seed of all random numbers."""
        ...

    @property
    def optimizer(self) -> str:
        """Name of the optimizer, as in `Regime`."""
        ...

    @property
    def target(self) -> float:
        """Training loss at which networks are compared."""
        ...

    @property
    def max_epochs(self) -> int:
        """Epochs after which a training stops anyway, as in `Regime`."""
        ...

    @property
    def work(self) -> float:
        """Units of work of the whole demonstration, as reported on the way."""
        ...


@final
@dataclass(frozen=True)
class DemoArm:
    """One of the two ways of training that a demonstration compares.

    Attributes:
        name: name in the singular, such as "small batch".
        batch: number of rows per step; None for all of them.
        rate: learning rate; None for the optimizer's usual one.
    """

    name: str
    batch: int | None
    rate: float | None = None

    @property
    def adjective(self) -> str:
        """Name of the arm before a noun, such as "small-batch"."""
        return self.name.replace(" ", "-")

    @property
    def minima(self) -> str:
        """Name of the arm's networks in a sentence, such as "small-batch minima"."""
        return f"{self.adjective} minima"

    def how(self, rows: int) -> str:
        """The difference from the other arm, in words.

        Args:
            rows: number of rows in the training set.
        """
        if self.rate is not None:
            return f"with learning rate {self.rate:g}"
        return f"with all {rows}" if self.batch is None else f"with {self.batch} rows per step"


@final
@dataclass(frozen=True)
class DemoSetting:
    """Properties of one demonstration beside its plan: architecture, arms, question and sentences.

    Attributes:
        network: the architecture, in words.
        arms: the two ways of training that are compared; the first is the baseline.
        question: the question that the comparison answers.
        fooled: the number by which an edited network passes for a sharper one.
        passing: sentence that says so; `{label}`, `{times}`, `{other}` and, for the canonical number, `{still}` are filled in.
        leading: position of the ladder whose sentence stands at the head of the report.
        together: whether trained and edited networks are shown in one table.
    """

    network: str
    arms: tuple[DemoArm, DemoArm]
    question: str
    fooled: Number
    passing: str
    leading: int = 0
    together: bool = False


@final
@dataclass(frozen=True)
class DemoNetwork:
    """A network of a demonstration, trained and measured.

    Attributes:
        arm: the way in which it was trained.
        seed: position within the arm; initial weights and order of rows follow from it and the plan's seed.
        training: outcome of its training.
        test_accuracy: accuracy on the held-out rows.
        table: every number, measured on the whole training set.
        model: the network itself.
    """

    arm: DemoArm
    seed: int
    training: Training
    test_accuracy: float
    table: Table
    model: nn.Module = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """Name of the network: its arm and its seed."""
        return f"{self.arm.name} {self.seed}"

    def estimate(self, number: Number) -> Estimate:
        """Estimate of one of the network's numbers."""
        return number.of(self.table).estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "label": self.label,
            "arm": self.arm.name,
            "batch": self.arm.batch,
            **({} if self.arm.rate is None else {"rate": self.arm.rate}),
            "seed": self.seed,
            **attributes(self, "training", "test_accuracy"),
            "records": plain(self.table.rows),
        }


def train_arms(
    data: Split, plan: DemoPlan, arms: tuple[DemoArm, DemoArm], build: Callable[[int], nn.Module], report: Report
) -> tuple[DemoNetwork, ...]:
    """Networks of both arms, trained and measured; pairs start from the same weights.

    Args:
        data: rows to train on, and rows that are held out.
        plan: settings of the demonstration.
        arms: the two ways of training.
        build: function that builds a network from the seed of its initial weights.
        report: function that is told what is going on.
    """

    def trained(arm: DemoArm, seed: int) -> DemoNetwork:
        model = build(stream(plan.seed, "network", seed).initial_seed())
        return _trained(model, data, plan, arm, seed, report)

    # Arms alternate, so that the time left is foreseen well.
    pairs = [[trained(arm, seed) for arm in arms] for seed in range(plan.seeds)]
    return tuple(network for arm in zip(*pairs, strict=True) for network in arm)


def _trained(model: nn.Module, data: Split, plan: DemoPlan, arm: DemoArm, seed: int, report: Report) -> DemoNetwork:
    """A network trained from its initial weights, and measured."""
    regime = Regime(arm.batch, plan.target, plan.optimizer, plan.max_epochs, arm.rate)
    label = f"{arm.name} {seed}"
    report(f"training {label}", 0.0)
    order = stream(plan.seed, "order", arm.name, seed)
    training = train(model, data.train, regime, order, shares(report, f"training {label}"))
    report(f"measuring {label}", 0.0)
    model.eval()
    table = measure_all(
        model,
        data.train,
        nn.CrossEntropyLoss(),
        measures=MEASURES,
        geometry=GEOMETRIES,
        seed=plan.seed,
        label=label,
    )
    report(f"measured {label}", 1.0)
    return DemoNetwork(arm, seed, training, accuracy(model, data.test), table, model)


def verdicts(networks: tuple[DemoNetwork, ...], arms: tuple[DemoArm, DemoArm]) -> dict[str, GroupVerdict]:
    """Verdicts on the second arm against the first, one for every number, over the networks that reached the target.

    Args:
        networks: the networks of both arms.
        arms: the baseline and the other arm.

    Returns:
        Verdicts by name of the number; none if an arm has fewer than two networks that reached the target.
    """
    first, second = (
        [network for network in networks if network.arm == arm and network.training.reached] for arm in arms
    )
    if min(len(first), len(second)) < 2:
        return {}
    return {
        number.name: compare(
            f"the {number.words}",
            (arms[0].minima, [network.estimate(number) for network in first]),
            (arms[1].minima, [network.estimate(number) for network in second]),
        )
        for number in NUMBERS
    }


@final
@dataclass(frozen=True)
class DemoLine:
    """One network in a table of all: as trained, or edited.

    Attributes:
        label: name of the network, and of the edit if there was one.
        loss: loss on the training set.
        records: record of each number, by its name.
        output_change: largest change of an output by the edit, relative to the largest output; None as trained.
        changes: relative change of each number by the edit, by its name; none as trained.
    """

    label: str
    loss: float
    records: Mapping[str, Record]
    output_change: float | None = None
    changes: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class DemoResult:
    """The findings of a demonstration: networks, verdicts and edits that keep the function.

    Attributes:
        setting: the demonstration's architecture, arms and question.
        plan: settings that were followed.
        data: name of the data set.
        networks: all trained networks, those that missed the target included.
        ladders: edits that keep the function, with the numbers after each.
        seconds: wall-clock time of the whole demonstration.
    """

    setting: DemoSetting
    plan: DemoPlan
    data: str
    networks: tuple[DemoNetwork, ...]
    ladders: tuple[Ladder, ...]
    seconds: float

    @cached_property
    def verdicts(self) -> dict[str, GroupVerdict]:
        """Verdicts on the two arms by name of the number; none if too few networks reached the target."""
        return verdicts(self.networks, self.setting.arms)

    @property
    def missed(self) -> tuple[DemoNetwork, ...]:
        """Networks above the target loss: shown, but left out of the comparison."""
        return tuple(network for network in self.networks if not network.training.reached)

    def arm(self, arm: DemoArm) -> tuple[DemoNetwork, ...]:
        """Networks of one arm."""
        return tuple(network for network in self.networks if network.arm == arm)

    @property
    def records(self) -> tuple[Record, ...]:
        """Record of every measured number."""
        networks = [record for network in self.networks for record in network.table]
        return (*networks, *(record for ladder in self.ladders for record in ladder.records))

    @property
    def lines(self) -> tuple[tuple[DemoLine, ...], ...]:
        """Lines of a table of all that was measured: a group for each arm, then one for each edited network."""
        groups = [
            tuple(
                DemoLine(
                    network.label, network.training.loss, {number.name: number.of(network.table) for number in NUMBERS}
                )
                for network in self.arm(arm)
            )
            for arm in self.setting.arms
        ]
        groups += [
            tuple(
                DemoLine(
                    f"{ladder.label}, {ladder.name} {rung.amount:g}",
                    rung.records[self.setting.fooled.name].point.loss,
                    rung.records,
                    rung.output_change,
                    rung.changes,
                )
                for rung in ladder.rungs[1:]
            )
            for ladder in self.ladders
        ]
        return tuple(groups)

    @property
    def sentences(self) -> tuple[str, ...]:
        """Sentences that say what was found."""
        return (*self.comparison, *self.manipulation)

    @property
    def comparison(self) -> tuple[str, ...]:
        """Sentences that say whether the minima of one arm are sharper."""
        found = [verdict.sentence for verdict in self.verdicts.values()]
        if not found:
            found.append("No comparison: fewer than two networks of an arm reached the target loss.")
        if self.missed:
            names = ", ".join(network.label for network in self.missed)
            found.append(
                f"Left out of the comparison, because they missed the target loss {self.plan.target:g}: {names}."
            )
        return tuple(found)

    @property
    def manipulation(self) -> tuple[str, ...]:
        """Sentences that say what edits that keep the function do to the numbers."""
        first, *others = (ladder.sentence for ladder in self.ladders)
        return (first, *self._overtaking(), *others)

    def _overtaking(self) -> list[str]:
        """A sentence on what the first ladder does to the comparison itself: its network, edited, against the other arm."""
        ladder, fooled = self.ladders[0], self.setting.fooled
        own = next(network.arm for network in self.networks if network.label == ladder.label)
        other = next(arm for arm in self.setting.arms if arm != own)
        sharpest = max(self.arm(other), key=lambda network: network.estimate(fooled).value)
        times, still = (
            ladder.rungs[-1].records[number.name].estimate.value / sharpest.estimate(number).value
            for number in (fooled, CANONICAL)
        )
        if times <= 1:
            return []
        words = f"{_amount(1 / still)} times flatter" if still < 1 else f"{_amount(still)} times sharper"
        return [
            self.setting.passing.format(label=ladder.label, times=_amount(times), other=other.adjective, still=words)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return attributes(self, "plan", "data", "verdicts", "networks", "ladders", "sentences", "seconds")


def _amount(times: float) -> str:
    return f"{times:.1f}" if times < 10 else f"{float(f'{times:.2g}'):,.0f}" if times < 1e9 else f"{times:.0e}"
