"""What a demonstration found, as numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from isoflat.core.record import Record
from isoflat.experiments.attack import Ladder
from isoflat.experiments.numbers import CANONICAL, NUMBERS
from isoflat.experiments.study import Arm, Plan, Setting, Trained
from isoflat.experiments.verdict import Verdict


@final
@dataclass(frozen=True)
class Line:
    """One network in a table of all: as trained, or edited.

    Attributes:
        label: what it is.
        loss: on the training set.
        records: each number, by name.
        output_change: relative to the network as trained; None for that itself.
        changes: of each number, relative to the network as trained, in the same precision.
    """

    label: str
    loss: float
    records: Mapping[str, Record]
    output_change: float | None = None
    changes: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class DemoResult:
    """What a demonstration found.

    Attributes:
        setting: which demonstration.
        plan: what was done.
        data: name of the data set.
        networks: all of them, those that missed the target included.
        verdicts: by name of the number; empty if too few networks reached the target.
        ladders: what edits that keep the function did.
        seconds: wall-clock time.
    """

    setting: Setting
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
    def lines(self) -> tuple[tuple[Line, ...], ...]:
        """Everything that was measured, for one table: a group for each arm, then one for each edited network."""
        groups = [
            tuple(
                Line(
                    network.label, network.training.loss, {number.name: number.of(network.table) for number in NUMBERS}
                )
                for network in self.arm(arm)
            )
            for arm in self.setting.arms
        ]
        groups += [
            tuple(
                Line(
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
        """What came out, in words."""
        return (*self.comparison, *self.manipulation)

    @property
    def comparison(self) -> tuple[str, ...]:
        """Whether the minima of one arm are sharper, in words."""
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
        """What the first ladder does to the comparison itself: its network, edited, against the other arm."""
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
    return f"{times:.1f}" if times < 10 else f"{float(f'{times:.2g}'):,.0f}" if times < 1e9 else f"{times:.0e}"
