"""The number that cannot be moved: find, prove, attack, measure again; and the representative it is taken at."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import isoflat
from cases.zoo import ZOO
from isoflat.geometry.canonical import GEOMETRY
from isoflat.symmetry.canonical import Epsilon, canonical

ROWS = 24

NAMES = [name for name in ZOO if name != "custom"]
"""Whose operations can be differentiated twice."""

WRONG_PRODUCTS = {"weight-normed"}
"""Whose second derivative torch's own weight normalisation gets wrong by a quarter (against central differences of
gradients); the generator identities refuse it."""

UNMOVED = {"smooth-gelu", "smooth-silu", "smooth-tanh", "lstm"}
"""Nothing but the head's common score moves them: the layer-wise number is next to invariant already."""

_cache: dict[str, tuple] = {}


def _setting(name):
    """The network, its data, and its symmetries under cross-entropy; traced once."""
    if name not in _cache:
        net, inputs = ZOO[name].build(), ZOO[name].inputs(ROWS)
        scores = net(*inputs)
        scores = scores if isinstance(scores, torch.Tensor) else scores[0]
        targets = torch.randint(scores.shape[1], (ROWS, *scores.shape[2:]), generator=torch.Generator().manual_seed(0))
        found = isoflat.symmetries(net, inputs, loss=nn.CrossEntropyLoss(), verify=False)
        _cache[name] = net, (inputs[0], targets), found
    return _cache[name]


def _measure(net, data, found, place=GEOMETRY):
    """The canonical number of a network with these symmetries."""
    bound = place.on(replace(found, model=net))
    return isoflat.measure(net, data, nn.CrossEntropyLoss(), geometry=bound, rtol=1e-9)


def _scores(net, data):
    """Outputs up to a common score of each example, which cross-entropy does not see."""
    with torch.no_grad():
        return torch.log_softmax(net(data[0]), 1)


def _distance(a, b):
    """Largest difference of a tensor, relative to its own norm; of the two nets' largest where it vanishes."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    size = max(float(p.norm()) for p, _ in pairs)
    return max(float((p - q).norm()) / (float(p.norm()) or size) for p, q in pairs)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WRONG_PRODUCTS])
def test_attack_does_not_move_it(name):
    net, data, found = _setting(name)
    before = _measure(net, data, found)
    for seed in (1, 2):
        twin = isoflat.reparametrize(net, found, seed=seed, spread=3)
        change = float((_scores(twin, data) - _scores(net, data)).abs().max() / _scores(net, data).abs().max())
        assert change <= 1e-10
        assert _measure(twin, data, found).value == pytest.approx(before.value, rel=1e-8)
    # Negative controls: what is not taken at the representative moves.
    for geometry in ("layerwise", "euclidean"):
        plain, moved = (
            isoflat.measure(n, data, nn.CrossEntropyLoss(), geometry=geometry, rtol=1e-3) for n in (net, twin)
        )
        if name not in UNMOVED and found.scaling.dimension:
            assert max(plain.lower, moved.lower) > 1.2 * min(plain.upper, moved.upper)


@pytest.mark.parametrize("name", NAMES)
def test_representative_is_one_point_of_the_orbit(name):
    """The same function; reached from anywhere on the orbit; left alone by a second pass."""
    net, data, found = _setting(name)
    canon = isoflat.canonicalize(net, found)
    change = (_scores(canon, data) - _scores(net, data)).abs().max() / _scores(net, data).abs().max()
    assert float(change) <= 1e-10
    for seed in (1, 2):
        again = isoflat.canonicalize(isoflat.reparametrize(net, found, seed=seed, spread=3), found)
        assert _distance(canon, again) <= 1e-10
    assert _distance(canon, isoflat.canonicalize(canon, found)) <= 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WRONG_PRODUCTS])
def test_frame_and_moved_model_agree(name):
    """`S⁻ᵀ H S⁻¹` at the user's weights is H at the representative: D H D there, with another Hessian altogether.

    Where one epsilon serves several factors, no network stands at the point that is measured, but one at the exact one.
    """
    net, data, found = _setting(name)
    point = canonical(found, found.state(), Epsilon.MOVED)
    canon = isoflat.canonicalize(net, found)
    whole = {name for name, mask in point.folded.items() if bool(mask.all())}
    if point.removed or any(not bool(mask.all()) for mask in point.folded.values()):
        pytest.skip("single coordinates without a block have no counterpart among whole tensors")
    moved = isoflat.measure(
        canon, data, nn.CrossEntropyLoss(), geometry="layerwise", params=lambda n, _: n not in whole, rtol=1e-9
    )
    framed = _measure(net, data, found, place=replace(GEOMETRY, epsilon=Epsilon.MOVED))
    assert framed.value == pytest.approx(moved.value, rel=1e-8)


def test_geometry_by_name_finds_proves_and_agrees():
    """The user's path, from a model and data: `geometry="auto"` is the default, in both precisions."""
    net, data, found = _setting("resnet-basic-batch")
    est = isoflat.measure(net, data, nn.CrossEntropyLoss(), rtol=1e-6)
    assert est.converged
    assert est.value == pytest.approx(_measure(net, data, found).value, rel=1e-6)
    assert any("generator identities hold" in note for note in est.notes)


def test_trained_network_keeps_its_number():
    """The same at a minimum, where the curvature comes from few directions."""
    net, data, found = _setting("vgg-batch")
    net = isoflat.reparametrize(net, found, spread=0.0)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(data[0]), data[1]).backward()
        optimiser.step()
    twin = isoflat.reparametrize(net, found, seed=3, spread=3)
    assert _measure(twin, data, found).value == pytest.approx(_measure(net, data, found).value, rel=1e-8)


def test_losses_of_more_than_the_output_are_caught():
    """Weight decay inside the loss is no function of the outputs: the generator identities fail, and say so."""
    net, data, _ = _setting("mlp-bias")

    def decayed(model, batch, strength):
        size = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + strength * size

    fine, broken = (isoflat.BatchLoss(lambda model, batch, s=s: decayed(model, batch, s)) for s in (0.0, 0.1))
    assert isoflat.measure(net, [data], fine).converged
    with pytest.raises(isoflat.SymmetryViolated, match="generator"):
        isoflat.measure(net, [data], broken)
