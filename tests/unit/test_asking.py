"""Readings in step: one forward pass over the data serves all, and what one cannot have costs the others nothing."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import isoflat
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.sweeps import Pass
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Asking, DataStatistic, Direction, Measure, Scene


class Counted(nn.Module):
    """A network that counts how often it is run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        self.runs = []

    def forward(self, x):
        self.runs.append(len(x))
        return self.layers(x)


@dataclass(frozen=True)
class Mean(DataStatistic):
    """Of the outputs' squares, times a factor."""

    factor: float
    framed = False

    def answer(self, scene: Scene) -> Asking[float]:
        found = yield Pass(lambda sweeps: self.factor * sweeps.z.detach().square().sum().reshape(1), 1)
        return float(found)


@dataclass(frozen=True)
class Difference(DataStatistic):
    """Of two others."""

    framed = False

    def answer(self, scene: Scene) -> Asking[float]:
        return (yield Mean(3.0)) - (yield Mean(1.0))


@dataclass(frozen=True)
class Failing(DataStatistic):
    """In the middle of a pass."""

    framed = False

    def answer(self, scene: Scene) -> Asking[float]:
        def part(sweeps):
            raise UsageError("no such thing")

        return float((yield Pass(part, 1)))


@dataclass(frozen=True)
class Content(DataStatistic):
    """With what another cannot have."""

    framed = False

    def answer(self, scene: Scene) -> Asking[str]:
        try:
            yield Failing()
        except UsageError as error:
            return str(error)


def named(name, reading, value=float):
    return Measure(
        name=name, formula="m", definition="A mean.", reference="none", units="none", direction=Direction.LOWER_IS_FLATTER,
        loss_degree=None, needs=lambda settings, options: (reading,), geometry="euclidean", claims=frozenset(Invariance),
        evaluate=lambda findings: Estimate.exact(value(findings.answers[0].result)),
    )  # fmt: skip


def _measured(*measures):
    torch.manual_seed(0)
    model = Counted().eval()
    inputs, targets = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    data = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]
    table = isoflat.measure_all(model, data, nn.CrossEntropyLoss(), measures=list(measures))
    mean = float(model.layers(inputs).detach().square().sum()) / 12
    return table, model.runs, mean


def test_one_forward_pass_serves_all_that_wait():
    one = len(_measured(named("mean", Mean(1.0)))[1])
    table, runs, mean = _measured(*(named(f"mean{k}", Mean(float(k))) for k in range(1, 5)))
    assert len(runs) == one
    assert [record.estimate.value for record in table] == pytest.approx([k * mean for k in range(1, 5)], rel=1e-12)


def test_what_others_ask_for_is_made_once_and_counted_once():
    alone = len(_measured(named("mean", Mean(1.0)))[1])
    table, runs, mean = _measured(named("difference", Difference()), named("mean", Mean(3.0)))
    # Mean(1) is asked for when Mean(3) is known: two batches more.
    assert len(runs) == alone + 2
    assert [record.estimate.value for record in table] == pytest.approx([2 * mean, 3 * mean], rel=1e-12)


def test_a_part_that_fails_is_refused_alone():
    table, _, mean = _measured(
        named("mean", Mean(1.0)), named("failing", Failing()), named("content", Content(), lambda told: len(told))
    )
    values = {record.measure: record.estimate.value for record in table}
    assert values == {"mean": pytest.approx(mean, rel=1e-12), "content": len("no such thing")}
    assert [omission.measure for omission in table.omitted] == ["failing"]
