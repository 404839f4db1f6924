"""What demonstrations share: two ways of training, and networks measured at one loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

import torch
from torch import nn

from isoflat.core.estimate import Estimate
from isoflat.core.rng import stream
from isoflat.core.table import Table
from isoflat.experiments.data import Split
from isoflat.experiments.loop import Regime, Training, accuracy, train
from isoflat.experiments.numbers import GEOMETRIES, MEASURES, NUMBERS, Number
from isoflat.experiments.verdict import Verdict, compare
from isoflat.measurement.run import measure_all

Report = Callable[[str, float], None]
"""Told what is being done, and how many units of work (one network is two) have been done since the last call."""


class Plan(Protocol):
    """What every demonstration's plan says; each has a frozen dataclass of its own."""

    @property
    def seeds(self) -> int:
        """Networks per arm."""
        ...

    @property
    def seed(self) -> int:
        """All randomness follows from it."""
        ...

    @property
    def optimizer(self) -> str:
        """See `Regime`."""
        ...

    @property
    def target(self) -> float:
        """Training loss at which networks are compared."""
        ...

    @property
    def max_epochs(self) -> int:
        """See `Regime`."""
        ...

    @property
    def work(self) -> float:
        """Units of work of the whole demonstration, as reported on the way."""
        ...


@final
@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: singular, such as "small batch".
        batch: rows per step; None for all of them.
        rate: learning rate; None for the optimizer's usual one.
    """

    name: str
    batch: int | None
    rate: float | None = None

    @property
    def adjective(self) -> str:
        """Its name before a noun."""
        return self.name.replace(" ", "-")

    @property
    def minima(self) -> str:
        """What its networks are called in a sentence."""
        return f"{self.adjective} minima"

    def how(self, rows: int) -> str:
        """What sets it apart, in words.

        Args:
            rows: of the training set.
        """
        if self.rate is not None:
            return f"with learning rate {self.rate:g}"
        return f"with all {rows}" if self.batch is None else f"with {self.batch} rows per step"


@final
@dataclass(frozen=True)
class Setting:
    """What is particular to one demonstration, beside its plan.

    Attributes:
        network: the architecture, in words.
        arms: the two ways of training that are compared; the first is the baseline.
        question: that the comparison answers.
        fooled: the number by which an edited network passes for a sharper one.
        passing: that sentence, with `{label}`, `{times}`, `{other}` and what the canonical number says, `{still}`.
        leading: which ladder's sentence stands at the head of the report.
        together: whether networks and edits are shown in one table.
    """

    network: str
    arms: tuple[Arm, Arm]
    question: str
    fooled: Number
    passing: str
    leading: int = 0
    together: bool = False


@final
@dataclass(frozen=True)
class Trained:
    """A trained and measured network.

    Attributes:
        arm: how it was trained.
        seed: its number within the arm; weights, order of rows and start vectors follow from it and the plan's seed.
        training: how the training went.
        test_accuracy: on the held-out rows.
        table: every number, on the whole training set.
        model: the network itself.
    """

    arm: Arm
    seed: int
    training: Training
    test_accuracy: float
    table: Table
    model: nn.Module = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """Arm and seed."""
        return f"{self.arm.name} {self.seed}"

    def estimate(self, number: Number) -> Estimate:
        """One of its numbers."""
        return number.of(self.table).estimate

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "label": self.label,
            "arm": self.arm.name,
            "batch": self.arm.batch,
            **({} if self.arm.rate is None else {"rate": self.arm.rate}),
            "seed": self.seed,
            "training": dict(vars(self.training)),
            "test_accuracy": self.test_accuracy,
            "records": [record.to_dict() for record in self.table],
        }


@contextmanager
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, suffer where cores are shared, and owe them their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_arms(
    data: Split, plan: Plan, arms: tuple[Arm, Arm], build: Callable[[int], nn.Module], report: Report
) -> tuple[Trained, ...]:
    """Networks of both arms, trained and measured; pairs start from the same weights.

    Args:
        data: what to train on.
        plan: how.
        arms: the two ways.
        build: a network from the seed of its initial weights.
        report: told what is going on.
    """

    def trained(arm: Arm, seed: int) -> Trained:
        model = build(stream(plan.seed, "network", seed).initial_seed())
        return _trained(model, data, plan, arm, seed, report)

    # Arms alternate, so that the time left is foreseen well.
    pairs = [[trained(arm, seed) for arm in arms] for seed in range(plan.seeds)]
    return tuple(network for arm in zip(*pairs, strict=True) for network in arm)


def _trained(model: nn.Module, data: Split, plan: Plan, arm: Arm, seed: int, report: Report) -> Trained:
    """One network, from its initial weights to its numbers."""
    regime = Regime(arm.batch, plan.target, plan.optimizer, plan.max_epochs, arm.rate)
    label = f"{arm.name} {seed}"
    reached = 0.0

    def progress(share: float) -> None:
        nonlocal reached
        report(f"training {label}", max(0.0, share - reached))
        reached = max(reached, share)

    report(f"training {label}", 0.0)
    training = train(model, data.train, regime, stream(plan.seed, "order", arm.name, seed), progress)
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
    return Trained(arm, seed, training, accuracy(model, data.test), table, model)


def verdicts(networks: tuple[Trained, ...], arms: tuple[Arm, Arm]) -> dict[str, Verdict]:
    """The second arm against the first by every number, over the networks that reached the target.

    Args:
        networks: of both arms.
        arms: the baseline and the other one.

    Returns:
        By name of the number; empty if an arm has fewer than two such networks.
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
