"""The demonstration: are large-batch minima sharper, and which number can be trusted to say so?

Everything here is a pure function of its arguments; nothing is printed or written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import nn

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.core.record import Record
from isoflat.core.streams import stream
from isoflat.core.table import Table
from isoflat.experiments.attack import Ladder, Victim, rescale_layers, rescale_units, shift_constants
from isoflat.experiments.data import Split
from isoflat.experiments.families import mlp, normed
from isoflat.experiments.loop import Recipe, Training, accuracy, train
from isoflat.experiments.numbers import GEOMETRIES, MEASURES, NUMBERS, PLAIN, Number
from isoflat.experiments.verdict import Verdict, compare
from isoflat.measures.run import measure_all

Report = Callable[[str, float], None]
"""Told what is being done, and how many units of work (one network is two) have been done since the last call."""


@final
@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: singular, such as "small batch".
        batch: rows per step; None for all of them.
    """

    name: str
    batch: int | None

    @property
    def minima(self) -> str:
        """What its networks are called in a sentence."""
        return f"{self.name.replace(' ', '-')} minima"


SMALL, LARGE = Arm("small batch", 16), Arm("large batch", None)


@final
@dataclass(frozen=True)
class Plan:
    """What the demonstration does.

    Attributes:
        seeds: networks per arm.
        seed: all randomness follows from it.
        optimizer: see `Recipe`.
        target: training loss at which networks are compared.
        widths: of the fully connected network, without biases.
        factors: how strongly the attacks rescale.
        shifts: constants that the last attack moves about.
        max_epochs: see `Recipe`.
    """

    seeds: int = 5
    seed: int = 0
    optimizer: str = "adam"
    target: float = 0.01
    widths: tuple[int, ...] = (64, 128, 128, 128, 10)
    factors: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    shifts: tuple[float, ...] = (0.0, 10.0, 100.0, 1000.0)
    max_epochs: int = 4000

    def __post_init__(self) -> None:
        """Refuse too few networks for any comparison."""
        if self.seeds < 2:
            raise UsageError(f"a comparison needs at least 2 seeds per arm, got {self.seeds}")
        if len(self.widths) < 4:
            raise UsageError(f"the attack on single units needs two hidden layers or more, got {self.widths}")

    @property
    def work(self) -> float:
        """Units of work of the whole demonstration, as reported on the way."""
        return 2.0 * 2 * self.seeds + 2 + len(self.factors) * 2 + len(self.shifts)


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
            "seed": self.seed,
            "training": dict(vars(self.training)),
            "test_accuracy": self.test_accuracy,
            "records": [record.to_dict() for record in self.table],
        }


@final
@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found.

    Attributes:
        plan: what was done.
        data: name of the data set.
        networks: all of them, those that missed the target included.
        verdicts: by name of the number; empty if too few networks reached the target.
        ladders: what edits that keep the function did: layers and units of one network rescaled, constants moved.
        seconds: wall-clock time.
    """

    plan: Plan
    data: str
    networks: tuple[Trained, ...]
    verdicts: dict[str, Verdict]
    ladders: tuple[Ladder, ...]
    seconds: float

    @property
    def missed(self) -> tuple[Trained, ...]:
        """Networks above the target loss: shown, but left out of the comparison."""
        return tuple(network for network in self.networks if not network.training.reached)

    def arm(self, arm: Arm) -> tuple[Trained, ...]:
        """Networks of one arm."""
        return tuple(network for network in self.networks if network.arm == arm)

    @property
    def records(self) -> tuple[Record, ...]:
        """Every measured number."""
        networks = [record for network in self.networks for record in network.table]
        return (*networks, *(record for ladder in self.ladders for record in ladder.records))

    @property
    def sentences(self) -> tuple[str, ...]:
        """What came out, in words."""
        return (*self.comparison, *self.manipulation)

    @property
    def comparison(self) -> tuple[str, ...]:
        """Whether large-batch minima are sharper, in words."""
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
        """What edits that keep the function do to the numbers, in words."""
        first, *others = (ladder.sentence for ladder in self.ladders)
        return (first, *self._overtaking(), *others)

    def _overtaking(self) -> list[str]:
        """What the attack does to the comparison itself."""
        large = [network.estimate(PLAIN).value for network in self.arm(LARGE)]
        ladder = self.ladders[0]
        times = ladder.rungs[-1].records[PLAIN.name].estimate.value / max(large)
        if times <= 1:
            return []
        return [
            f"By the plain number the rescaled {ladder.label} would pass for {_amount(times)} times sharper than the "
            "sharpest large-batch network, although it computes the same function as before."
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "plan": {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self.plan).items()},
            "data": self.data,
            "verdicts": {name: verdict.to_dict() for name, verdict in self.verdicts.items()},
            "networks": [network.to_dict() for network in self.networks],
            "ladders": [ladder.to_dict() for ladder in self.ladders],
            "sentences": list(self.sentences),
            "seconds": self.seconds,
        }


def _amount(times: float) -> str:
    return f"{times:.1f}" if times < 10 else f"{float(f'{times:.2g}'):,.0f}"


def run(data: Split, plan: Plan, report: Report = lambda text, done: None) -> DemoResult:
    """Train, measure, compare, attack.

    Args:
        data: what to train on.
        plan: how.
        report: told what is going on.
    """
    started = time.monotonic()

    def attacking(text: str) -> None:
        report(text, 1.0)

    with _one_thread():
        # Arms alternate, so that the time left is foreseen well.
        pairs = [[_trained(data, plan, arm, seed, report) for arm in (SMALL, LARGE)] for seed in range(plan.seeds)]
        networks = tuple(network for arm in zip(*pairs, strict=True) for network in arm)
        victim = Victim.prepare(networks[0].model, data.train, networks[0].label)
        ladders = [climb(victim, plan.factors, plan.seed, attacking) for climb in (rescale_layers, rescale_units)]
        model = _normed(data, plan, report)
        other = Victim.prepare(model, data.train, "batch-normalised")
        ladders.append(shift_constants(other, normed.pairs(model), plan.shifts, plan.seed, attacking))
    verdicts = {number.name: _verdict(networks, number) for number in NUMBERS}
    found = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
    return DemoResult(plan, data.name, networks, found, tuple(ladders), time.monotonic() - started)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small networks gain nothing from threads, suffer where cores are shared, and owe them their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trained(data: Split, plan: Plan, arm: Arm, seed: int, report: Report) -> Trained:
    """One network, from its seed to its numbers; both arms start from the same weights."""
    model = mlp.build(plan.widths, bias=False, seed=stream(plan.seed, "network", seed).initial_seed())
    recipe = Recipe(arm.batch, plan.target, plan.optimizer, plan.max_epochs)
    label = f"{arm.name} {seed}"
    reached = 0.0

    def progress(share: float) -> None:
        nonlocal reached
        report(f"training {label}", max(0.0, share - reached))
        reached = max(reached, share)

    report(f"training {label}", 0.0)
    training = train(model, data.train, recipe, stream(plan.seed, "order", arm.name, seed), progress)
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


def _normed(data: Split, plan: Plan, report: Report) -> nn.Sequential:
    """A smaller network with biases and batch normalisation, trained with small batches to the same loss."""
    report("training batch-normalised", 0.0)
    model = normed.build((plan.widths[0], *plan.widths[2:]), seed=stream(plan.seed, "normed").initial_seed())
    recipe = Recipe(SMALL.batch, plan.target, plan.optimizer, plan.max_epochs)
    train(model, data.train, recipe, stream(plan.seed, "order", "normed"))
    report("trained batch-normalised", 2.0)
    return model


def _verdict(networks: tuple[Trained, ...], number: Number) -> Verdict | None:
    """Large against small batches, over the networks that reached the target."""
    small, large = (
        [network.estimate(number) for network in networks if network.arm == arm and network.training.reached]
        for arm in (SMALL, LARGE)
    )
    if min(len(small), len(large)) < 2:
        return None
    return compare(f"the {number.words}", (SMALL.minima, small), (LARGE.minima, large))
