"""Data in parts by hardness: the parts add up to the whole, and the numbers are those of the whole."""

import itertools
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import isoflat
from isoflat.core.rng import stream
from isoflat.risk.batches import as_batches, rows_of
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network
from isoflat.risk.plan import by_hardness
from isoflat.risk.routes.reverse import Recomputed

ROWS = 2304


def _batches():
    """Ragged, of every form a batch may have."""
    x, y = torch.randn(50, 3, generator=stream(0)), torch.arange(50)
    cuts = (0, 7, 8, 30, 50)
    pairs = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    return {
        "pairs": pairs,
        "mappings": [{"x": a, "scale": torch.ones(1), "label": [b]} for a, b in pairs],
        "arrays": [(a.numpy(), b.numpy()) for a, b in pairs],
    }


@pytest.mark.parametrize("form", ["pairs", "mappings", "arrays"])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_only_some_rows(form, rows):
    """The rows asked for, in order, in batches of the size asked for."""
    places = torch.tensor([0, 6, 7, 8, 9, 29, 31, 48, 49])
    found = list(as_batches(_batches()[form]).only(places, rows))
    sizes = [rows_of(batch) for batch in found]
    assert sum(sizes) == len(places)
    assert all(size == rows for size in sizes[:-1])
    labels = [batch["label"][0] if form == "mappings" else batch[1] for batch in found]
    assert np.concatenate([np.asarray(label) for label in labels]).tolist() == places.tolist()
    if form == "mappings":
        assert all(batch["scale"].shape == (1,) for batch in found)


def _learned():
    """A network that has learned all but a few examples, whose labels are wrong."""
    x = torch.randn(ROWS, 6, generator=stream(0, "inputs"))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(300):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()
    y[::100] = (y[::100] + 1) % 4
    return net.double(), (x.double(), y)


@pytest.fixture(scope="module")
def learned():
    return _learned()


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64), ignore_index=3),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
)
def test_parts_add_up(learned, loss):
    """Each part's Hessian is divided by what the whole counts."""
    net, data = learned
    network = Network(net)
    risk, state = EmpiricalRisk(network, as_loss(loss), as_batches(data)), network.state()
    seen = risk.survey(state)
    places = by_hardness(seen.hardness)
    assert len(places) > 1
    vector = torch.randn(state.space.size, 1, generator=stream(1), dtype=torch.float64)
    parts = [replace(risk, batches=risk.batches.only(part, 100), of=seen.count) for part in places]
    total = sum(Recomputed(part, state).products(vector) for part in parts)
    expected = Recomputed(risk, state).products(vector)
    assert torch.linalg.vector_norm(total - expected) <= 1e-12 * torch.linalg.vector_norm(expected)


def test_hardness_is_the_distance_to_the_target(learned):
    """‖p − y‖ for softmax cross-entropy, in the order of the data."""
    net, data = learned
    network = Network(net)
    seen = EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), as_batches(data, 100)).survey(network.state())
    with torch.no_grad():
        gap = net(data[0]).softmax(1) - nn.functional.one_hot(data[1], 4)
    torch.testing.assert_close(seen.hardness, gap.norm(dim=1))


@pytest.mark.parametrize("geometry", ["euclidean", "auto"])
@pytest.mark.parametrize("certify", [True, False])
def test_same_numbers_for_less(learned, geometry, certify):
    """With parts and without: both right, and one cheaper."""
    net, data = learned
    settings = {"measure": "quotient_spectral_norm", "geometry": geometry, "certify": certify, "rtol": 1e-4}
    parted = isoflat.measure(net, data, nn.CrossEntropyLoss(), **settings)
    with mock.patch("isoflat.risk.plan.WORTHWHILE", ROWS + 1):
        plain = isoflat.measure(net, data, nn.CrossEntropyLoss(), **settings)
        exact = isoflat.measure(net, data, nn.CrossEntropyLoss(), **(settings | {"certify": True, "rtol": 1e-10}))
    assert parted.converged
    assert parted.value == pytest.approx(exact.value, rel=1e-4)
    assert parted.value <= exact.upper
    assert parted.cost.products < plain.cost.products
    if certify:
        assert parted.lower <= exact.upper
        assert exact.lower <= parted.upper


def test_no_parts_where_the_loss_needs_its_batch_whole(learned):
    """A loss that is no sum over rows is not taken apart."""
    net, (x, y) = learned

    def loss(output, target):
        centred = output - output.mean(0)
        return nn.functional.cross_entropy(centred, target)

    table = isoflat.measure_all(net, [(x, y)], loss, measures=["hessian_spectral_norm"], geometry="euclidean")
    assert table[0].settings["parts"] == [1.0]
    usual = isoflat.measure_all(net, [(x, y)], nn.CrossEntropyLoss(), measures=["hessian_spectral_norm"])
    assert len(usual[0].settings["parts"]) > 1
