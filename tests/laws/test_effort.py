"""What every measure promises beside invariance: it repeats itself, scales with the loss, and effort pays."""

from functools import cache

import pytest
import torch
from torch import nn

import isoflat
from isoflat import Kind
from isoflat.measures.catalogue import find_measure, measures
from isoflat.testing import ARENAS, usable

NAMES = tuple(measures())
ARENA = ARENAS[0]


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "mean as a function": lambda output, target: nn.functional.cross_entropy(output, target) + 0.0,
    "three times the mean": lambda output, target: 3.0 * nn.functional.cross_entropy(output, target),
}


def afresh(loss="mean", seed=0, rtol=1e-6, probes=16, budget=300):
    """The number of every measure, in the paper's metric where it has no other."""
    net, _, data = ARENA.networks()
    every = [_short(usable(name)) for name in NAMES]
    options = {"rtol": rtol, "seed": seed, "probes": probes, "budget": budget}
    table = isoflat.measure_all(net, data, LOSSES[loss], measures=every, geometry="layerwise", **options)
    return {row.measure.partition("(")[0]: row.estimate for row in table}


def _short(entry):
    """Chains of a few steps repeat themselves, and scale, as long ones do."""
    entry = find_measure(entry)
    return entry.with_options(chains=2, draws=20, burn=20) if "chains" in entry.options else entry


numbers, again = cache(afresh), cache(afresh)


def measured(name, made=numbers, **options):
    found = made(**options).get(name)
    if found is None:
        pytest.skip(f"{name} does not apply to this network and loss")
    return found


def same(a, b) -> bool:
    return (a.value, a.lower, a.upper) == (b.value, b.lower, b.upper)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_number(name):
    assert same(measured(name), measured(name, made=again))


def test_another_seed_gives_another_where_something_is_random():
    """The negative control of the test above."""
    moved = {name for name, found in numbers().items() if not same(found, numbers(seed=1)[name])}
    random = {name for name, found in numbers().items() if found.kind is Kind.STANDARD_ERROR}
    exact = {name for name, found in numbers().items() if found.kind is Kind.EXACT}
    assert random <= moved
    assert not exact & moved


@pytest.mark.parametrize("name", NAMES)
def test_degree_in_the_loss(name):
    """Three times the loss; where only softmax cross-entropy will do, its sum over the data."""
    degree = measures()[name].loss_degree
    if degree is None:
        pytest.skip("no power of the loss")
    before, after, factor = "mean as a function", "three times the mean", 3
    if name not in numbers(loss=after) and not name.startswith("tic"):  # a sum has more rows, not larger gradients
        before, after, factor = "mean", "sum", len(ARENA.networks()[2][1])
    one, many = measured(name, loss=before), measured(name, loss=after)
    assert many.value == pytest.approx(one.value * factor**degree, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_effort_pays(name):
    """More of it never widens what is known, and the two answers agree."""
    coarse, fine = measured(name, rtol=0.1, probes=4, budget=10), measured(name, probes=64)
    # Of random numbers a sample's spread is itself random: sixteen times the probes make up for that.
    assert fine.upper - fine.lower <= coarse.upper - coarse.lower
    if fine.kind is not Kind.STANDARD_ERROR:
        assert coarse.lower <= fine.upper
        assert fine.lower <= coarse.upper
    assert torch.isfinite(torch.tensor([fine.value, fine.lower, fine.upper])).all()
