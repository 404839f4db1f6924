"""Samples with known chances: unbiased, honest about what they leave open, and refused where they make no sense."""

from __future__ import annotations

import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare
from scipy.stats import t as student
from torch import nn

import isoflat
from isoflat.core.errors import UnsupportedModel, UsageError
from isoflat.core.rng import stream
from isoflat.curvature.matrix import Curvature
from isoflat.linalg.eigen.extremes import Which
from isoflat.linalg.eigen.lanczos import Lanczos
from isoflat.measurement import sample as module
from isoflat.measurement.subject import subject
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import as_loss, importance
from isoflat.risk.network import Network, exactly
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.sampling import Sample, curvatures, inclusion

LOSS = nn.CrossEntropyLoss()


@functools.cache
def trained(rows: int = 6000):
    """A small classifier of five overlapping clouds, nearly trained, in float64: most of its examples are easy."""
    random = stream(0, "clouds")
    centres = torch.randn(5, 8, generator=random, dtype=torch.float64) * 1.6
    y = torch.randint(5, (rows,), generator=random)
    x = centres[y] + torch.randn(rows, 8, generator=random, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    step = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(300):
        step.zero_grad()
        LOSS(net(x), y).backward()
        step.step()
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval(), (x, y)


@functools.cache
def truth(measure: str = "quotient_spectral_norm") -> float:
    net, data = trained()
    return isoflat.measure(net, data, LOSS, measure=measure, geometry="layerwise", rtol=1e-8).value


def risk_of(rows: int = 300, loss=LOSS):
    net, (x, y) = trained()
    network = Network(net)
    risk = EmpiricalRisk(network, as_loss(loss), as_batches((x[:rows], y[:rows]), 100))
    return risk, network.state()


@given(
    scores=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=3, max_size=60),
    share=st.floats(0.05, 0.95),
)
@settings(max_examples=100, deadline=None)
def test_chances_add_up_and_grow_with_the_score(scores: list[float], share: float):
    size = max(1, round(share * len(scores)))
    chances = inclusion(torch.tensor(scores), size)
    assert float(chances.sum()) == pytest.approx(size, rel=1e-9)
    assert bool((chances > 0).all())
    assert bool((chances <= 1).all())
    order = torch.tensor(scores, dtype=torch.float64).argsort()
    assert bool((chances[order].diff() >= -1e-12).all())


def test_every_example_comes_as_often_as_its_chance_says():
    chances = inclusion(torch.arange(40.0) ** 3, 12)
    counts, repeats = torch.zeros(40), 4000
    for k in range(repeats):
        sample = Sample.of(chances, stream(0, k))
        assert sample.size == 12
        assert sample.certain == int((chances == 1).sum())
        assert torch.equal(sample.chances, chances[sample.places])
        counts[sample.places] += 1
    open_ = chances < 1
    expected = (chances * repeats)[open_].numpy()
    found = counts[open_].numpy()
    assert chisquare(found, expected * found.sum() / expected.sum()).pvalue > 1e-4
    assert bool((counts[~open_] == repeats).all())


def test_totals_are_unbiased_and_their_intervals_cover():
    """Of 2 000 samples of a skewed population: the mean total, and 93 to 97.5 % of the t-intervals at 95 %."""
    random = np.random.default_rng(0)
    scores = random.lognormal(0, 2, 3000)
    values = torch.tensor(scores * random.lognormal(0, 0.7, 3000))
    chances = inclusion(torch.tensor(scores), 300)
    totals, hits = [], 0
    for k in range(2000):
        sample = Sample.of(chances, stream(1, k))
        totals.append(float((values[sample.places] / sample.chances).sum()))
        error, freedom = sample.scatter(values[sample.drawn.places])
        hits += abs(totals[-1] - float(values.sum())) <= student.isf(0.025, freedom) * error
    mean, spread = np.mean(totals), np.std(totals)
    assert abs(mean - float(values.sum())) <= 4 * spread / math.sqrt(2000)
    assert 0.93 <= hits / 2000 <= 0.975
    # Uniform sampling of as many would be off by several times as much.
    assert spread < 0.25 * float(values.std()) * 3000 * math.sqrt((1 - 0.1) / 300)


def test_equal_chances_scatter_as_a_simple_random_sample():
    """`N √((1 − f) / n) s`, the textbook's standard error of a total without replacement; what is certain adds nothing."""
    rows, drawn = 50, 8
    values = torch.tensor(np.random.default_rng(2).normal(3.0, 1.0, drawn))
    chances = torch.cat([torch.ones(2, dtype=torch.float64), torch.full((drawn,), drawn / rows, dtype=torch.float64)])
    error, freedom = Sample(torch.arange(len(chances)), chances).scatter(values)
    assert error == pytest.approx(rows * math.sqrt((1 - drawn / rows) / drawn) * float(values.std()), rel=1e-12)
    assert 1 <= freedom <= drawn - 1


def test_what_is_taken_beyond_a_sample_keeps_totals_unbiased():
    """Rows that a larger sample has for certain count once; the others count by the chances they were drawn with."""
    random = np.random.default_rng(4)
    scores = torch.tensor(random.lognormal(0, 1.5, 100))
    values = torch.tensor(random.lognormal(0, 0.5, 100))
    small, large = inclusion(scores, 20), inclusion(scores, 50)
    totals = []
    for k in range(400):
        sample = Sample.of(small, stream(5, k)).beyond(large)
        assert set((large == 1).nonzero()[:, 0].tolist()) <= set(sample.places.tolist())
        totals.append(float((values[sample.places] / sample.chances).sum()))
    assert abs(np.mean(totals) - float(values.sum())) <= 4 * np.std(totals) / math.sqrt(400)


def test_forecasts_come_true():
    """What a pilot says of a larger sample's error is that sample's error, to a third."""
    random = np.random.default_rng(1)
    scores = torch.tensor(random.lognormal(0, 1.5, 4000))
    values = scores * torch.tensor(random.lognormal(0, 0.5, 4000))
    larger = inclusion(scores, 600)
    pilot = Sample.of(inclusion(scores, 300), stream(2))
    errors = []
    for k in range(50):
        sample = Sample.of(larger, stream(3, k))
        errors.append(sample.scatter(values[sample.drawn.places])[0])
    assert pilot.forecast(values[pilot.places], larger) == pytest.approx(np.mean(errors), rel=0.35)


def test_a_sample_of_everything_is_everything():
    risk, state = risk_of()
    everything = Sample.of(torch.ones(300, dtype=torch.float64), stream(0))
    with exactly(state.device):
        whole, sampled = risk.survey(state), everything.risk(risk, 300, 64).survey(state)
        assert sampled.loss == pytest.approx(whole.loss, rel=1e-12)
        assert torch.allclose(sampled.gradient, whole.gradient, rtol=0, atol=1e-13 * float(whole.gradient.abs().max()))


@pytest.mark.parametrize(
    "loss", [LOSS, nn.CrossEntropyLoss(reduction="sum"), lambda z, y: nn.functional.cross_entropy(z, y)]
)
def test_a_weight_of_two_is_the_row_twice(loss):
    net, (x, y) = trained()
    network, state = Network(net), Network(net).state()
    twice = EmpiricalRisk(
        network, as_loss(loss), as_batches((torch.cat([x[:40], x[:10]]), torch.cat([y[:40], y[:10]])))
    )
    once = EmpiricalRisk(network, as_loss(loss), as_batches((x[:40], y[:40])))
    weights = torch.cat([torch.full((10,), 2.0), torch.ones(30)]).double()
    sample = Sample(torch.arange(40), 1 / weights)
    vectors = torch.randn(state.space.size, 2, generator=stream(0), dtype=torch.float64)
    with exactly(state.device):
        expected = Curvature(Recomputed(twice, state)).matmat(vectors)
        found = Curvature(Recomputed(sample.risk(once, 50, 16), state)).matmat(vectors)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_an_operator_is_unbiased():
    """The mean of 400 samples' Hessians is the Hessian, to four standard errors entry by entry."""
    risk, state = risk_of(60)
    with exactly(state.device):
        seen = risk.screen(state)
        chances = inclusion(seen.hardness, 20)
        vector = torch.randn(state.space.size, 1, generator=stream(4), dtype=torch.float64)
        expected = Curvature(Recomputed(risk, state)).matmat(vector)[:, 0]
        found = torch.stack(
            [
                Curvature(Recomputed(Sample.of(chances, stream(5, k)).risk(risk, seen.count, 60), state)).matmat(
                    vector
                )[:, 0]
                for k in range(400)
            ]
        )
    error = found.std(dim=0) / 20
    off = (found.mean(dim=0) - expected).abs()
    assert float((off <= 4 * error + 1e-12 * expected.abs().max()).double().mean()) > 0.995


def test_forms_of_rows_add_up_to_the_form_of_the_hessian():
    risk, state = risk_of()
    one, other = torch.randn(2, state.space.size, generator=stream(6), dtype=torch.float64)
    with exactly(state.device):
        rows = curvatures(risk, state, one, other)
        product = Curvature(Recomputed(risk, state)).matmat(other[:, None])[:, 0]
    assert rows.shape == (300,)
    assert float(rows.sum() / 300) == pytest.approx(float(one @ product), rel=1e-10)


@pytest.mark.parametrize(("outputs", "tolerance"), [(5, 1e-12), (200, 0.35)])
def test_importance_is_slope_and_curvature_of_the_loss(outputs: int, tolerance: float):
    """Exact where every output is looked at, an estimate by random signs where they are many."""
    z = torch.randn(7, outputs, generator=stream(7), dtype=torch.float64).requires_grad_(True)
    y = torch.randint(outputs, (7,), generator=stream(8))
    p = z.detach().softmax(1)
    slope = (p - nn.functional.one_hot(y, outputs)).norm(dim=1)
    found = importance(nn.functional.cross_entropy(z, y, reduction="sum"), z, stream(9))
    assert found.tolist() == pytest.approx((slope + 1 - (p * p).sum(1)).tolist(), rel=tolerance)


def test_screening_sees_what_a_survey_sees():
    risk, state = risk_of()
    with exactly(state.device):
        screened, surveyed = risk.screen(state), risk.survey(state)
    for name in ("loss", "accuracy", "chance", "rows", "count", "digests"):
        assert getattr(screened, name) == getattr(surveyed, name), name
    assert screened.gradient.numel() == 0


def covered(seeds: range, rtol: float = 0.1) -> tuple[int, int]:
    """How often the full number lies inside, and of how many; where all was measured after all does not count."""
    net, data = trained()
    hits, counted = 0, 0
    for seed in seeds:
        found = isoflat.measure(net, data, LOSS, geometry="layerwise", rtol=rtol, sample="auto", seed=seed)
        assert found.converged
        assert found.relative_width <= rtol
        if any("sampled: " in note for note in found.notes):
            counted += 1
            hits += found.lower <= truth() <= found.upper
    return hits, counted


def test_the_interval_covers_the_number_of_all_data():
    hits, counted = covered(range(12))
    assert counted >= 10
    assert hits >= binom.ppf(1e-3, counted, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [0.1, 0.05])
def test_coverage_of_500_samples(rtol: float):
    """At least 95 % at 95 % nominal, as far as 500 can tell."""
    hits, counted = covered(range(1000, 1500), rtol)
    print(f"rtol {rtol}: {hits} of {counted} cover")
    assert counted >= 350
    assert hits >= binom.ppf(1e-2, counted, 0.95)


def test_minibatches_are_biased_upwards_and_fixed_vectors_are_not():
    """Jensen: the mean of the largest eigenvalue over samples is above that of all data, that of a fixed form is at it."""
    risk, state = risk_of(1000)
    with exactly(state.device):
        seen = risk.screen(state)
        chances = inclusion(seen.hardness, 40)
        solver = Lanczos(Which.LARGEST, rtol=1e-6)
        full = solver(Curvature(Recomputed(risk, state)), stream(10)).top
        tops, forms = [], []
        for k in range(60):
            operator = Curvature(Recomputed(Sample.of(chances, stream(11, k)).risk(risk, seen.count, 60), state).keep())
            tops.append(solver(operator, stream(10)).top.value)
            forms.append(float(full.vector @ operator.matvec(full.vector)))
    assert np.mean(tops) - 3 * np.std(tops) / math.sqrt(60) > full.value
    assert abs(np.mean(forms) - full.value) <= 4 * np.std(forms) / math.sqrt(60)


def test_all_is_measured_where_the_tolerance_needs_it():
    net, (x, y) = trained()
    fine = isoflat.measure(net, (x, y), LOSS, geometry="layerwise", rtol=1e-4, sample="auto")
    assert fine.value == pytest.approx(truth(), rel=1e-4)
    assert any("all were measured" in note and "of 6000 examples" in note for note in fine.notes)
    few = isoflat.measure(net, (x[:500], y[:500]), LOSS, geometry="layerwise", rtol=0.1, sample="auto")
    plain = isoflat.measure(net, (x[:500], y[:500]), LOSS, geometry="layerwise", rtol=0.1)
    assert (few.value, few.lower, few.upper) == (plain.value, plain.lower, plain.upper)
    assert any("too few to sample from" in note for note in few.notes)


def test_a_table_has_sampled_and_whole_numbers_in_its_order():
    net, data = trained()
    table = isoflat.measure_all(
        net,
        data,
        LOSS,
        measures=["quotient_trace", "quotient_largest_eigenvalue", "quotient_spectral_norm"],
        geometry=["auto", "layerwise"],
        rtol=0.1,
        probes=20,
        sample="auto",
    )
    names = [(row.measure, row.geometry) for row in table]
    assert names == [
        (measure, place)
        for measure in ("quotient_trace", "quotient_largest_eigenvalue", "quotient_spectral_norm")
        for place in ("auto", "layerwise")
    ]
    for row in table:
        note = "no sampled form" if row.measure == "quotient_trace" else "sampled: "
        assert any(note in text for text in row.estimate.notes)
    exact = truth()
    assert table["quotient_spectral_norm", "layerwise"].estimate.lower <= exact
    assert exact <= table["quotient_spectral_norm", "layerwise"].estimate.upper
    assert table[2].settings["sample"] == "auto"


def test_equal_seeds_give_equal_bits():
    net, data = trained()
    one, two = (isoflat.measure(net, data, LOSS, rtol=0.1, sample="auto", seed=3) for _ in range(2))
    assert (one.value, one.lower, one.upper) == (two.value, two.lower, two.upper)


def test_what_cannot_be_sampled_is_refused():
    net, data = trained()
    with pytest.raises(UsageError, match="sample must be 'auto'"):
        isoflat.measure(net, data, LOSS, sample="some")
    with pytest.raises(UsageError, match="certify=False"):
        isoflat.measure(net, data, LOSS, sample="auto", certify=False)
    own = isoflat.BatchLoss(
        lambda model, batch: (nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), 1)
    )
    with pytest.raises(UsageError, match=r"draws single rows.*the sum of the losses.*leave sample out"):
        isoflat.measure(net, data, own, geometry="layerwise", sample="auto")


def test_a_network_without_forward_derivatives_is_refused():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, *gradients):
            return 2 * ctx.saved_tensors[0] * gradients[0]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.last(Square.apply(self.first(x)))

    _, data = trained()
    with pytest.raises(UnsupportedModel, match="forward derivatives"):
        isoflat.measure(Own().double(), data, LOSS, geometry="layerwise", rtol=0.1, sample="auto")


def test_products_that_are_not_exact_give_no_interval_on_a_sample():
    """Differences of gradients: all is measured, uncertified as without a sample, instead of a refusal of certify=False."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *gradients):
            return (1 - ctx.saved_tensors[0].tanh() ** 2) * gradients[0]

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 3), nn.Linear(3, 5)

        def forward(self, x):
            return self.last(Once.apply(self.first(x)))

    _, data = trained()
    found = isoflat.measure(Own().double(), data, LOSS, geometry="layerwise", rtol=0.1, sample="auto")
    assert found.confidence == 0
    assert any("products are not exact" in note for note in found.notes)


def test_a_budget_that_is_spent_ends_with_what_there_is(monkeypatch):
    """No further sample, though this seed's first witness was the wrong one: a wide interval that says so, and covers."""
    net, data = trained()
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    budget = isoflat.Budget(seconds=100)
    found = isoflat.measure(net, data, LOSS, geometry="layerwise", rtol=0.1, sample="auto", budget=budget, seed=1)
    assert not found.converged
    assert any("leave a relative width" in note for note in found.notes)
    assert found.lower <= truth() <= found.upper


def test_products_are_counted_in_passes_over_all_data():
    """Of the pilot, the searches and every sample: no fewer than the witness's one, and far below those of all data."""
    net, data = trained()
    some, whole = (
        isoflat.measure(net, data, LOSS, geometry="layerwise", rtol=0.1, sample=sample) for sample in ("auto", None)
    )
    again = isoflat.measure(net, data, LOSS, geometry="layerwise", rtol=0.1, sample="auto", seed=1)
    assert 1 <= some.cost.products < whole.cost.products
    assert again.cost.products > some.cost.products  # this seed needs a second sample


def test_the_users_criterion_keeps_its_precision():
    """Products in float64 of a loss with float32 weights: the loss is the user's, and stays as it is."""
    net, (x, y) = trained()
    loss = nn.CrossEntropyLoss(weight=torch.ones(5))
    target = subject(net, (x[:50], y[:50]), loss)
    with exactly(target.state.device):
        target.risk.survey(target.state)
    assert loss.weight.dtype == torch.float32
