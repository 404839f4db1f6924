"""Attacks on numbers: the canonical one survives, the paper's and the plain one do not."""

import json

import pytest
import torch
from torch import nn

from isoflat import UsageError, symmetries
from isoflat.experiments.attack import attack


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)
    )


def _data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 4, generator=generator), torch.arange(40) % 3


def _attacked(net=None, loss=None, targets=None, **asked):
    net = _net() if net is None else net
    inputs, classes = _data()
    loss = nn.CrossEntropyLoss() if loss is None else loss
    found = symmetries(net, inputs, loss=loss if targets is None else None)
    return attack(net, (inputs, classes if targets is None else targets), loss, symmetries=found, **asked)


@pytest.fixture(scope="module")
def orbit():
    return _attacked(points=2, search=1)


def test_the_canonical_number_survives_and_the_others_do_not(orbit):
    auto, layerwise, plain = orbit.rows
    assert (auto.name, layerwise.name) == ("quotient_spectral_norm (auto)", "quotient_spectral_norm (layerwise)")
    assert auto.survives
    assert auto.drift < 1e-8
    for row in (layerwise, plain):
        assert not row.survives
        assert row.drift > 1
        assert row.lowest < row.highest


def test_every_copy_is_the_same_function(orbit):
    assert len(orbit.twins) == 2 + 3 * 1
    assert orbit.measured
    assert orbit.output_change <= 1e-10
    assert orbit.loss_change <= 1e-10


def test_ranges_hold_every_value_and_the_worst_copy_is_named(orbit):
    for number, row in enumerate(orbit.rows):
        values = {twin.label: twin.estimates[number].value for twin in orbit.measured}
        before = row.before.estimate.value
        assert row.lowest == min(before, *values.values())
        assert row.highest == max(before, *values.values())
        assert row.drift == abs(values[row.worst] - before) / abs(before)


def test_it_is_strict_json_and_repeatable(orbit):
    text = json.dumps(orbit.to_dict(), allow_nan=False)
    assert len(json.loads(text)["copies"]) == len(orbit.twins)
    again = _attacked(points=2, search=1)
    assert [(row.lowest, row.highest, row.worst) for row in again.rows] == [
        (row.lowest, row.highest, row.worst) for row in orbit.rows
    ]


def test_searching_moves_a_number_further_than_chance():
    plan = {"measures": ("quotient_spectral_norm",), "geometry": ("layerwise",), "points": 1}
    random, searched = (_attacked(**plan, search=steps).rows[0] for steps in (0, 4))
    assert searched.highest > random.highest


def test_uncertified_values_are_judged_by_their_residuals():
    orbit = _attacked(measures=("quotient_spectral_norm",), points=2, search=0, certify=False)
    assert [row.survives for row in orbit.rows] == [True, False]
    assert all(row.tolerance < 0.1 for row in orbit.rows)


def test_the_network_is_not_changed():
    net = _net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _attacked(net, measures=("hessian_spectral_norm",), points=1, search=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net[3].eps == 1e-5


def test_nothing_to_attack_with_and_plans_without_meaning_are_refused():
    smooth = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(UsageError, match="nothing to attack"):
        _attacked(smooth, nn.MSELoss(), torch.zeros(40, 2))
    with pytest.raises(UsageError, match="0 points"):
        _attacked(points=0, search=0)
    with pytest.raises(UsageError, match="spread"):
        _attacked(spread=0.0)


def test_copies_that_rounding_changes_are_left_out_and_where_all_are_it_says_so(monkeypatch):
    monkeypatch.setattr("isoflat.experiments.attack.TOLERANCE", -1.0)
    with pytest.raises(UsageError, match="smaller spread"):
        _attacked(measures=("hessian_spectral_norm",), points=2, search=0)
