"""Training: when it stops, what a regime does to the weights, and that being killed changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isoflat.core.errors import DataError, NonFinite, UnknownName, UsageError
from isoflat.core.rng import stream
from isoflat.experiments import families, loop
from isoflat.experiments.families import alexnet, lenet, vgg
from isoflat.experiments.loop import Checkpoint, Regime, accuracy, full_loss, train

CLASSES = 3
BOTH = Regime(8, None, "sgd", 7, 0.05, momentum=0.8, weight_decay=0.01, halve_every=2)
AIMED = Regime(8, 0.5, "adam", 30, 0.02, halve_every=5)
SGD = Regime(None, None, "sgd", 7, 0.1, momentum=0.7, weight_decay=0.05, halve_every=3)
WHOLE = Regime(None, None, "adam", 6, 0.02, weight_decay=0.001)


def _data(rows=38, seed=0, dtype=torch.float32):
    drawing = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=drawing, dtype=dtype)
    return inputs, (inputs[:, :CLASSES] + 0.1 * torch.randn(rows, CLASSES, generator=drawing, dtype=dtype)).argmax(1)


def _model(seed=0, dropout=0.0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = (nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(dropout), nn.Linear(9, CLASSES))
        return nn.Sequential(*parts).to(dtype)


def _order(seed=0):
    return torch.Generator().manual_seed(seed)


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _trained(regime, dropout=0.0, seed=0, **others):
    model = _model(dropout=dropout)
    training = train(model, _data(), regime, _order(seed), **others)
    return _weights(model), replace(training, seconds=0.0)


class _Killer:
    """Progress that is interrupted at one look."""

    def __init__(self, look):
        self.left = look

    def __call__(self, share):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def _killed(look, regime, path, every=1, dropout=0.0):
    with pytest.raises(KeyboardInterrupt):
        _trained(regime, dropout, progress=_Killer(look), checkpoint=Checkpoint(path, every))


def _plain(model, data, batch, target, epochs, shuffling, rate):
    """Adam until a loss is reached, written down once more."""
    inputs, targets = data
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)

    def evaluated():
        model.eval()
        with torch.no_grad():
            return float(F.cross_entropy(model(inputs), targets))

    loss, steps, looks = evaluated(), 0, 0
    per_epoch = math.ceil(len(targets) / batch)
    for _ in range(epochs):
        for chosen in torch.randperm(len(targets), generator=shuffling).split(batch):
            if loss <= target:
                break
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
            steps += 1
            if loss <= 1.5 * target or steps % max(1, per_epoch // 8) == 0:
                loss, looks = evaluated(), looks + 1
    return evaluated(), steps, looks


@pytest.mark.parametrize(("batch", "target"), [(2, 0.3), (8, 0.3), (8, 1e-9)])
def test_training_to_a_target_stops_just_below_it_or_is_reported(batch, target):
    data, one, two, shares = _data(), _model(), _model(), []
    training = train(one, data, Regime(batch, target, max_epochs=20, rate=0.01), _order(), shares.append)
    loss, steps, looks = _plain(two, data, batch, target, 20, _order(), 0.01)
    assert _same(one.state_dict(), two.state_dict())
    assert (training.loss, training.steps, training.reached) == (loss, steps, loss <= target)
    assert len(shares) == looks + 1
    assert shares[-1] == 1.0
    assert training.history == ()
    assert not one.training


def test_without_a_target_all_epochs_are_trained_and_looked_at():
    shares, model = [], _model()
    training = train(model, _data(), replace(BOTH, max_epochs=4), _order(), shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert (training.reached, training.steps, training.epochs) == (True, 20, 4.0)
    assert [epoch for epoch, _ in training.history] == [1, 2, 3, 4]
    assert training.history[-1][1] == training.loss == full_loss(model, _data())
    assert json.loads(json.dumps(dict(vars(training))))["history"] == [list(look) for look in training.history]


@given(rows=st.integers(1, 60), piece=st.integers(1, 70), places=st.sampled_from([(), (4,)]))
def test_a_loss_in_pieces_is_the_loss_of_the_whole(rows, piece, places):
    drawing = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, CLASSES, *places, generator=drawing)
    targets = torch.randint(CLASSES, (rows, *places), generator=drawing)
    whole = float(F.cross_entropy(scores, targets))
    with patch.object(loop, "ROWS", piece):
        loss, share = full_loss(nn.Identity(), (scores, targets)), accuracy(nn.Identity(), (scores, targets))
    assert loss == whole if piece >= rows else loss == pytest.approx(whole, rel=1e-6)
    assert share == float((scores.argmax(1) == targets).double().mean())


def test_a_short_last_piece_counts_for_less():
    inputs, targets = _data(37)
    model = _model().eval()
    with patch.object(loop, "ROWS", 36):
        loss = full_loss(model, (inputs, targets))
    pieces = [F.cross_entropy(model(inputs[rows]), targets[rows]).item() for rows in (slice(36), slice(36, 37))]
    assert loss != pytest.approx(sum(pieces) / 2, rel=1e-3)
    assert loss == pytest.approx((36 * pieces[0] + pieces[1]) / 37, rel=1e-12)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("piece", [7, 38])
def test_a_step_in_pieces_is_the_step_on_the_whole(piece, normed):
    """Also where the last piece is short; where batches are normalised there are no pieces."""

    def trained(rows):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 9), *[nn.BatchNorm1d(9)] * normed, nn.ReLU(), nn.Linear(9, CLASSES)).double()
        seen = []
        net[0].register_forward_hook(lambda _, args, __: seen.append((len(args[0]), torch.is_grad_enabled())))
        with patch.object(loop, "PIECE", rows):
            train(net, _data(dtype=torch.float64), replace(SGD, max_epochs=3), _order())
        return nn.utils.parameters_to_vector(net.parameters()).detach(), {rows for rows, learning in seen if learning}

    whole, pieces = trained(1000), trained(piece)
    assert torch.allclose(whole[0], pieces[0], rtol=1e-9, atol=0)
    assert pieces[1] == ({38} if normed or piece == 38 else {7, 3})


def _by_hand(regime, data):
    """SGD on all rows, by its formula."""
    model = _model(dtype=torch.float64)
    parameters = list(model.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    for epoch in range(regime.max_epochs):
        rate = regime.rate * (1 if regime.halve_every is None else 0.5 ** (epoch // regime.halve_every))
        gradients = torch.autograd.grad(F.cross_entropy(model.train()(data[0]), data[1]), parameters)
        with torch.no_grad():
            for p, velocity, gradient in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(regime.momentum).add_(gradient + regime.weight_decay * p)
                p.sub_(rate * velocity)
    return nn.utils.parameters_to_vector(parameters)


@pytest.mark.parametrize(
    "change", [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"halve_every": None}, {"halve_every": 1}, {"rate": 0.05}]
)
def test_momentum_decay_and_halving_are_those_of_the_formula(change):
    data, model, regime = _data(dtype=torch.float64), _model(dtype=torch.float64), replace(SGD, **change)
    train(model, data, regime, _order())
    vector = nn.utils.parameters_to_vector(model.parameters())
    assert torch.allclose(vector, _by_hand(regime, data), rtol=1e-10, atol=0)
    assert not change or not torch.allclose(vector, _by_hand(SGD, data), rtol=1e-3, atol=0)


def test_weight_decay_reaches_adam():
    weights = [_trained(replace(WHOLE, weight_decay=decay))[0] for decay in (0.0, 0.1)]
    model = _model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(WHOLE.max_epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(_data()[0]), _data()[1]).backward()
        optimizer.step()
    assert _same(weights[1], model.state_dict())
    assert not _same(*weights)


@pytest.mark.parametrize("look", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_training_goes_on_as_if_nothing_had_been(tmp_path, look, every):
    path = tmp_path / "training.pt"
    whole = _trained(BOTH, 0.5)
    assert _trained(BOTH, 0.5, checkpoint=Checkpoint(tmp_path / "undisturbed.pt", every))[1] == whole[1]
    _killed(look, BOTH, path, every, 0.5)
    assert path.exists() == (look > every)
    weights, training = _trained(BOTH, 0.5, checkpoint=Checkpoint(path, every))
    assert _same(weights, whole[0])
    assert training == whole[1]


@pytest.mark.parametrize(
    ("regime", "looks"), [(AIMED, (12, 9, 7)), (WHOLE, (3, 3, 2)), (replace(AIMED, batch=None), (2, 5, 4))]
)
def test_a_training_may_be_killed_again_and_again(tmp_path, regime, looks):
    path, whole = tmp_path / "training.pt", _trained(regime, 0.2)
    for look in looks:
        _killed(look, regime, path, 1, 0.2)
    for _ in range(2):  # the second time from its own end
        weights, training = _trained(regime, 0.2, checkpoint=Checkpoint(path, 1))
        assert _same(weights, whole[0])
        assert training == whole[1]


def test_a_process_that_is_shot_is_survived(tmp_path):
    path, whole = tmp_path / "training.pt", _trained(BOTH, 0.5)
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_training as t\n"
        "def shoot(share):\n"
        "    if share > 0.6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "t._trained(t.BOTH, 0.5, progress=shoot, checkpoint=t.Checkpoint(Path(sys.argv[2]), 2))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(path)], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["way"]["steps"] == 20
    weights, training = _trained(BOTH, 0.5, checkpoint=Checkpoint(path, 2))
    assert _same(weights, whole[0])
    assert training == whole[1]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path, broken):
    path, whole = tmp_path / "training.pt", _trained(BOTH)
    _killed(3, BOTH, path)
    before = path.read_bytes()
    where = os if broken == "fsync" else Path
    with patch.object(where, broken, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        _trained(BOTH, checkpoint=Checkpoint(path, 1))
    assert path.read_bytes() == before
    weights, training = _trained(BOTH, checkpoint=Checkpoint(path, 1))
    assert _same(weights, whole[0])
    assert training == whole[1]


def test_the_seconds_of_all_processes_add_up(tmp_path):
    path = tmp_path / "training.pt"
    _killed(4, BOTH, path)
    content = torch.load(path, weights_only=True)
    content["way"]["seconds"] = 1000.0
    torch.save(content, path)
    assert 1000 < train(_model(), _data(), BOTH, _order(), checkpoint=Checkpoint(path, 1)).seconds < 1100


def _refused(path, words, model=None, data=None, regime=BOTH, seed=0):
    """That a checkpoint is refused, and file, model and order of rows stay as they were."""
    model = _model() if model is None else model
    before, weights, shuffling = path.read_bytes(), _weights(model), _order(seed)
    with pytest.raises(DataError, match=words) as caught:
        train(model, _data() if data is None else data, regime, shuffling, checkpoint=Checkpoint(path, 1))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert _same(weights, model.state_dict())
    assert torch.equal(shuffling.get_state(), _order(seed).get_state())


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "training.pt"
    _killed(3, BOTH, path)
    _refused(path, r"\(regime differ\)", regime=replace(BOTH, rate=0.04))
    _refused(path, r"\(data differ\)", data=_data(seed=1))
    _refused(path, r"\(data differ\)", data=(_data()[0], _data()[1].roll(1)))
    _refused(path, r"\(initial weights differ\)", model=_model(seed=1))
    _refused(path, r"\(order of the rows differ\)", seed=1)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "training.pt"
    _killed(2, BOTH, path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-40], whole[: len(whole) // 2]):
        path.write_bytes(content)
        _refused(path, "no whole checkpoint")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    _refused(path, "no whole checkpoint")
    for content in ({"weights": torch.zeros(3)}, [1, 2], torch.zeros(2)):
        torch.save(content, path)
        _refused(path, "no checkpoint of a training")


def test_no_flipped_bit_goes_unnoticed_where_it_matters(tmp_path):
    path = tmp_path / "training.pt"
    _killed(7, BOTH, path)
    content, whole = path.read_bytes(), _trained(BOTH)
    refused = 0
    for place in range(11, len(content), len(content) // 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            weights, training = _trained(BOTH, checkpoint=Checkpoint(path, 100))
        except DataError as error:
            refused += str(path) in str(error)
        else:
            assert _same(weights, whole[0])
            assert training == whole[1]
    assert refused > 15


def test_where_nothing_can_be_saved_is_said(tmp_path):
    with pytest.raises(UsageError, match="does not exist; create it first"):
        _trained(BOTH, checkpoint=Checkpoint(tmp_path / "none" / "training.pt", 1))
    with pytest.raises(UsageError, match="every 1 or more epochs"):
        Checkpoint(tmp_path / "training.pt", 0)
    full = OSError(28, "No space left on device")
    with patch.object(os, "fsync", side_effect=full), pytest.raises(UsageError, match="No space left"):
        _trained(BOTH, checkpoint=Checkpoint(tmp_path / "training.pt", 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_global_random_state_is_neither_touched_nor_read(dropout):
    ways = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            ways.append(_trained(BOTH, dropout))
            assert torch.equal(before, torch.get_rng_state())
            with pytest.raises(KeyboardInterrupt):
                _trained(BOTH, dropout, progress=_Killer(2))
            assert torch.equal(before, torch.get_rng_state())
    assert _same(ways[0][0], ways[1][0])
    assert ways[0][1] == ways[1][1]


def test_dropout_follows_from_the_order_of_the_rows():
    weights = [_trained(WHOLE, 0.5, seed)[0] for seed in (0, 1)]
    assert not _same(*weights)
    assert _same(*(_trained(WHOLE, 0.0, seed)[0] for seed in (0, 1)))  # else all rows in one step have no order


def test_a_training_that_diverges_is_an_error():
    with pytest.raises(NonFinite, match="take a smaller step"):
        train(nn.Linear(6, CLASSES), _data(), Regime(8, None, "sgd", 50, 1e38), _order())
    with pytest.raises(DataError, match="at least one row"):
        train(_model(), _data(0), BOTH, _order())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be at least 1"),
        ({"halve_every": 0}, "halve_every must be at least 1"),
        ({"target": 0.0}, "target must be positive"),
        ({"target": math.nan}, "target must be positive"),
        ({"rate": -1.0}, "learning rate must be positive"),
        ({"momentum": 1.0}, "momentum must be at least 0 and less than 1"),
        ({"optimizer": "adam"}, "set for sgd only, got 0.8 with adam"),
        ({"weight_decay": -0.1}, "must not be negative"),
        ({"weight_decay": math.inf}, "must not be negative"),
    ],
)
def test_regimes_without_meaning_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        replace(BOTH, **change)


def test_an_unknown_optimizer_or_family_is_refused_with_the_nearest_names():
    with pytest.raises(UnknownName, match="Did you mean adam"):
        Regime(8, optimizer="adan")
    with pytest.raises(UnknownName, match="Did you mean vgg"):
        families.find("vgg16")
    for name in ("os", "__init__", "mlp.build"):
        with pytest.raises(UnknownName):
            families.find(name)


def test_every_family_is_found():
    assert families.names() == ("alexnet", "decoder", "lenet", "mlp", "normed", "vgg")
    assert families.find("vgg") is vgg.build
    assert families.find("lenet") is lenet.build


def _count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_numbers_of_parameters_are_those_counted_by_hand():
    convolutions = (3 * 25 + 1) * 64 + (64 * 25 + 1) * 64
    assert _count(alexnet.build()) == convolutions + (4096 + 1) * 384 + (384 + 1) * 192 + (192 + 1) * 10 == 1_756_426
    head = (512 + 1) * 512 + (512 + 1) * 240 + (240 + 1) * 10
    assert _count(vgg.build()) == 14_714_688 + head  # the published VGG-16's and VGG-11's convolutions
    assert _count(vgg.build(depth=11)) == 9_220_480 + head
    assert _count(lenet.build()) == (25 + 1) * 20 + (500 + 1) * 50 + (800 + 1) * 500 + (500 + 1) * 10
    assert _count(lenet.build(width=0.2)) == (25 + 1) * 4 + (100 + 1) * 10 + (160 + 1) * 100 + (100 + 1) * 10


def test_layers_are_those_of_the_papers():
    deep = vgg.build(width=0.125)
    kinds = [type(layer) for layer in deep]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.MaxPool2d, nn.Linear, nn.Dropout)] == [13, 5, 3, 2]
    assert [layer.out_channels for layer in vgg.build(depth=11) if isinstance(layer, nn.Conv2d)] == [
        64, 128, 256, 256, 512, 512, 512, 512,
    ]  # fmt: skip
    small = alexnet.build()
    assert tuple(small[:7](torch.zeros(1, 3, 32, 32)).shape) == (1, 4096)
    assert all(layer.bias is not None for layer in (*deep, *small) if isinstance(layer, (nn.Conv2d, nn.Linear)))
    with pytest.raises(UsageError, match="depth 11 or 16, got 13"):
        vgg.build(depth=13)


@pytest.mark.parametrize(
    "build",
    [
        lambda **given: alexnet.build(**{"width": 0.125, **given}),
        lambda **given: vgg.build(**{"width": 0.125, "depth": 11, **given}),
        lambda **given: lenet.build(**{"width": 0.2, **given}),
    ],
    ids=["alexnet", "vgg", "lenet"],
)
def test_initial_weights_depend_on_the_arguments_only(build):
    with torch.random.fork_rng(devices=[]):
        one = _weights(build())
        torch.manual_seed(5)
        before = torch.get_rng_state()
        two = _weights(build())
        assert torch.equal(before, torch.get_rng_state())
    assert _same(one, two)
    assert not _same(one, _weights(build(seed=1)))
    assert _weights(build(classes=3))["output.bias"].shape == (3,)
    with pytest.raises(UsageError, match="must be positive"):
        build(width=0.0)


def test_the_usual_lenet_has_the_initial_weights_it_always_had():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(4, "lenet", 10, True).initial_seed())
        layers = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5), nn.Linear(800, 500), nn.Linear(500, 10)
    expected = [p for layer in layers for p in layer.parameters()]
    for model in (lenet.build(seed=4), lenet.build(seed=4, width=1.0)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))
