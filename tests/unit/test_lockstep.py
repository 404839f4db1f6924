"""Questions in step: one pass over the data serves all that wait for one, and what one cannot have costs the others nothing."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import isoflat
from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.sweeps import Pass
from isoflat.geometry.base import Invariance
from isoflat.measurement import engine
from isoflat.measures.base import DataStatistic, Measure, Question
from isoflat.risk.moved import AtWeights


class Counted(nn.Module):
    """A network that counts how often it is run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        self.runs = []

    def forward(self, x):
        self.runs.append(len(x))
        return self.layers(x)


class Read:
    """Batches that count how often all of them are read."""

    def __init__(self, *batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@dataclass(frozen=True)
class Mean(DataStatistic):
    """Of the outputs' squares, times a factor."""

    factor: float
    framed = False

    def sweep(self, point, *found):
        return Pass(lambda sweeps: self.factor * sweeps.z.detach().square().sum().reshape(1), 1)

    def finish(self, point, total, *found):
        return float(total)


@dataclass(frozen=True)
class Difference(DataStatistic):
    """Of two others: no pass of its own."""

    framed = False

    def requires(self, point):
        return Mean(3.0), Mean(1.0)

    def finish(self, point, total, *found):
        assert total is None
        return found[0] - found[1]


@dataclass(frozen=True)
class Failing(DataStatistic):
    """In the middle of a pass."""

    framed = False

    def sweep(self, point, *found):
        def part(sweeps):
            raise UsageError("no such thing")

        return Pass(part, 1)

    def finish(self, point, total, *found):
        return float(total)


@dataclass(frozen=True)
class Needing(DataStatistic):
    """What another cannot have."""

    framed = False

    def requires(self, point):
        return (Failing(),)

    def finish(self, point, total, *found):
        return found[0]


@dataclass(frozen=True)
class Walk(Question):
    """Losses at weights that shrink, one after the other, and the gradient at the last."""

    steps_taken: int

    def steps(self, point, *found):
        losses = []
        for k in range(self.steps_taken):
            moved = point.state.replace({n: t * 0.5**k for n, t in point.state.parameters.items()})
            losses.append((yield AtWeights(point.risk, moved)).loss)
        last = yield AtWeights(point.risk, point.state, gradient=True)
        return losses, last.gradient


def named(name, reading, value=float):
    return Measure(
        name=name, formula="m", definition="A mean.", reference="none", units="none", loss_degree=None,
        needs=(reading,), geometry="euclidean", claims=frozenset(Invariance),
        evaluate=lambda findings: Estimate.exact(value(findings.answers[0].result)),
    )  # fmt: skip


def _measured(*measures):
    torch.manual_seed(0)
    model = Counted().eval()
    inputs, targets = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 2
    data = Read((inputs[:6], targets[:6]), (inputs[6:], targets[6:]))
    table = isoflat.measure_all(model, data, nn.CrossEntropyLoss(), measures=list(measures))
    model.passes = data.passes
    mean = float(model.layers(inputs).detach().square().sum()) / 12
    return table, model, mean


def test_one_forward_pass_serves_all_that_wait():
    one = len(_measured(named("mean", Mean(1.0)))[1].runs)
    table, model, mean = _measured(*(named(f"mean{k}", Mean(float(k))) for k in range(1, 5)))
    assert len(model.runs) == one
    assert [record.estimate.value for record in table] == pytest.approx([k * mean for k in range(1, 5)], rel=1e-12)


def test_what_others_require_is_made_once_and_shares_their_pass():
    alone = len(_measured(named("mean", Mean(1.0)))[1].runs)
    table, model, mean = _measured(named("difference", Difference()), named("mean", Mean(3.0)))
    assert len(model.runs) == alone
    assert [record.estimate.value for record in table] == pytest.approx([2 * mean, 3 * mean], rel=1e-12)


def test_a_part_that_fails_is_refused_alone_with_what_requires_it():
    table, _, mean = _measured(named("mean", Mean(1.0)), named("failing", Failing()), named("needing", Needing()))
    values = {record.measure: record.estimate.value for record in table}
    assert values == {"mean": pytest.approx(mean, rel=1e-12)}
    assert {omission.measure: "no such thing" in omission.reason for omission in table.omitted} == {
        "failing": True,
        "needing": True,
    }


def test_searches_at_other_weights_share_passes_and_see_the_risk_there():
    losses = []
    walks = [named(f"walk{k}", Walk(k), lambda found: losses.append(found) or found[0][-1]) for k in (2, 5)]
    one = _measured(named("mean", Mean(1.0)))[1].passes
    table, model, _ = _measured(*walks)
    # The longer walk takes 5 losses and a gradient, the shorter no pass of its own.
    assert model.passes == one - 1 + 6
    assert losses[0][0] == losses[1][0][:2]
    assert torch.equal(losses[0][1], losses[1][1]) and float(losses[0][1].norm()) == pytest.approx(
        table[0].point.gradient_norm, rel=1e-12
    )


def test_what_precedes_the_first_pass_counts_in_the_cost(monkeypatch):
    found = engine.with_groups

    def slowly(*args):
        time.sleep(0.5)
        return found(*args)

    monkeypatch.setattr(engine, "with_groups", slowly)
    table, _, _ = _measured(named("mean", Mean(1.0)))
    assert table[0].estimate.cost.seconds >= 0.5
