"""Flatness of layers, neurons and features against dense blocks of the Hessian and closed forms."""

import math

import pytest
import torch
from torch import Tensor, nn

import isoflat
from cases.networks import Case, cnn, mlp, scale

DOUBLE = torch.float64


def number(case: Case, measure: str, **options) -> isoflat.Estimate:
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, geometry="euclidean", **options)


class _Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


def _pooled(*layers: nn.Module, shape=(2, 7, 7), criterion=None, rows=9, channels=4) -> Case:
    """These layers, ReLU, mean over positions, linear layer; random weights."""
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(
        *layers, nn.ReLU(inplace=isinstance(layers[-1], nn.Conv2d)), _Mean(), nn.Linear(channels, 3)
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DOUBLE) * (2 / max(1, p[0].numel())) ** 0.5)
    inputs = torch.randn(rows, *shape, generator=generator, dtype=DOUBLE)
    targets = torch.randint(3, (rows,), generator=generator)
    return Case(net, inputs, targets, criterion or nn.CrossEntropyLoss())


def _block(case: Case, name: str) -> Tensor:
    """The Hessian's block of one tensor, through torch.func, as a square of the tensor's shape flattened to rows."""
    weight = dict(case.net.named_parameters())[name].detach()

    def loss(part: Tensor) -> Tensor:
        return case.criterion(torch.func.functional_call(case.net, {name: part}, (case.inputs,)), case.targets)

    rows = len(weight)
    return torch.func.hessian(loss)(weight).detach().reshape(rows, weight.numel() // rows, rows, weight.numel() // rows)


def _contracted(case: Case, name: str) -> float:
    """`Σ ⟨w_s, w_s'⟩ tr H_ss'`."""
    weight = dict(case.net.named_parameters())[name].detach().flatten(1)
    return float(torch.einsum("sj,tj,siti->", weight, weight, _block(case, name)))


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE), label_smoothing=0.1)

CONVOLUTIONS = {
    "plain": lambda: _pooled(nn.Conv2d(2, 4, 3)),
    "no bias, weighted classes": lambda: _pooled(nn.Conv2d(2, 4, 3, bias=False), criterion=WEIGHTED),
    "padded, with strides": lambda: _pooled(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2))),
    "reflected": lambda: _pooled(nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect")),
    "second of two": lambda: _pooled(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 2)),
    "in one dimension": lambda: _pooled(nn.Conv1d(2, 4, 3, stride=2, padding=1), shape=(2, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_relative_flatness_of_a_convolution_is_the_contracted_block_of_its_kernel(name):
    case = CONVOLUTIONS[name]()
    kernel = [key for key, p in case.net.named_parameters() if p.ndim > 2][-1]
    truth = _contracted(case, kernel)
    found = number(case, "relative_flatness_conv")
    assert found.kind is isoflat.Kind.EXACT
    assert found.value == pytest.approx(truth, rel=1e-9)
    assert f"relative flatness is that of {kernel}" in found.notes


def test_of_a_convolution_filters_may_be_scaled_and_batches_cut(monkeypatch):
    """Filters against the linear layer, any rows at a time; the channels that the kernel reads are another matter."""
    case = CONVOLUTIONS["second of two"]()
    before = number(case, "relative_flatness_conv").value
    inputs, targets = case.data
    targets = targets.clone()
    targets[:2] = -100
    cut = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    whole, parts = (
        isoflat.measure(case.net, data, case.criterion, measure="relative_flatness_conv").value
        for data in ((inputs, targets), cut)
    )
    assert parts == pytest.approx(whole, rel=1e-12)
    from isoflat.measures.entries import relative_flatness_conv

    monkeypatch.setattr(relative_flatness_conv, "MEMORY", 1)
    assert number(case, "relative_flatness_conv").value == pytest.approx(before, rel=1e-12)
    factors = torch.tensor([100.0, 0.02, 5.0, 1.0], dtype=DOUBLE)
    scale(case.net, {"2.weight": factors[:, None, None, None], "2.bias": factors, "5.weight": 1 / factors})
    assert number(case, "relative_flatness_conv").value == pytest.approx(before, rel=1e-9)
    read = torch.tensor([10.0, 0.1, 1.0], dtype=DOUBLE)
    column = read[:, None, None, None]
    scale(case.net, {"0.weight": column, "0.bias": read, "2.weight": 1 / read[:, None, None]})
    assert abs(number(case, "relative_flatness_conv").value / before - 1) > 0.1


class _Shared(nn.Module):
    """One convolution, twice: the scores are what the last call gives, but not linear in the kernel."""

    def __init__(self):
        super().__init__()
        self.own, self.head = nn.Conv2d(2, 2, 3, padding=1, dtype=DOUBLE), nn.Linear(2, 3, dtype=DOUBLE)

    def forward(self, x):
        return self.head(self.own(self.own(x)).relu().mean((2, 3)))


def test_other_networks_than_convolution_mean_and_linear_layer_are_refused():
    known = r"closed form where torch\.nn\.Conv1d or Conv2d, ReLU, the mean over all positions and torch\.nn\.Linear"
    others = [
        cnn(2, bias=True, seed=0),
        mlp((4, 3), bias=True, seed=0),
        _pooled(nn.Conv2d(2, 4, 3), nn.Tanh()),
        _pooled(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval()),
        _pooled(nn.Conv2d(2, 4, 3, groups=2)),
    ]
    for case in others:
        with pytest.raises(isoflat.UsageError, match=known):
            number(case, "relative_flatness_conv")
    case = CONVOLUTIONS["plain"]()
    with pytest.raises(isoflat.UsageError, match=r"0\.weight is held fixed"):
        number(case, "relative_flatness_conv", params="3.*")
    torch.manual_seed(0)
    with pytest.raises(isoflat.UnsupportedModel, match=r"not linear in own\.weight"):
        number(Case(_Shared(), *case.data, case.criterion), "relative_flatness_conv")
    with pytest.raises(isoflat.UsageError, match="softmax cross-entropy"):
        number(Case(case.net, case.inputs, torch.zeros(9, 3, dtype=DOUBLE), nn.MSELoss()), "relative_flatness_conv")


@pytest.mark.parametrize("make", [lambda: mlp((5, 6, 4, 3), bias=True, seed=3), lambda: cnn(2, bias=True, seed=1)])
def test_flatness_of_neurons_from_their_blocks_of_the_hessian(make):
    case, truth = make(), 0.0
    for name, p in case.net.named_parameters():
        if p.ndim > 1:
            traces = torch.einsum("sisi->s", _block(case, name))
            truth += float(p.detach().flatten(1).square().sum(1) @ traces)
    found = number(case, "neuronwise_flatness")
    assert found.kind is isoflat.Kind.EXACT
    assert found.value == pytest.approx(truth, rel=1e-9)


class _Table(nn.Module):
    """A matrix that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(5, 4, dtype=DOUBLE)), nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x):
        return self.head((x @ self.table).relu())


def test_matrices_without_neurons_are_named_or_refused():
    torch.manual_seed(0)
    case = mlp((5, 4, 3), bias=True, seed=0)
    case = Case(_Table(), *case.data, case.criterion)
    assert any("left out: table" in note for note in number(case, "neuronwise_flatness").notes)
    with pytest.raises(isoflat.UsageError, match="here there is none"):
        number(case, "neuronwise_flatness", params="table")
    smooth = mlp((5, 4, 3), bias=True, seed=0, activation=nn.Tanh)
    with pytest.raises(isoflat.UnsupportedModel, match="smooth nonlinearity"):
        number(smooth, "neuronwise_flatness")


def test_feature_robustness_is_relative_flatness_for_small_changes():
    """`E_A = δ²/(2m) κ + O(δ⁴)`, with `A_ij ~ N(0, 1/m)`."""
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    flat = number(case, "relative_flatness(normalised=0)").value
    for delta in (1e-3, 1e-2):
        found = number(case, f"feature_robustness(delta={delta:g}, draws=2000)")
        assert found.lower <= delta**2 / 8 * flat <= found.upper
        assert found.standard_error < 0.05 * found.value
        assert len(found.samples) == 2000


def test_feature_robustness_with_matrices_that_are_formed():
    """Large changes: A in full, the features multiplied by it, the loss from the scores."""
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    case = Case(case.net, *case.data, nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])))
    found = number(case, "feature_robustness(delta=0.8, draws=1000)")
    generator, changes = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        features = case.net[:4](case.inputs)
        start = case.criterion(case.net[4](features).float(), case.targets)
        for _ in range(2000):
            a = torch.randn(4, 4, generator=generator, dtype=DOUBLE) / 2
            changes.append(
                float(case.criterion(case.net[4](features + 0.8 * features @ a.T).float(), case.targets) - start)
            )
    brute = torch.tensor(changes, dtype=DOUBLE)
    error = math.hypot(found.standard_error, float(brute.std()) / len(brute) ** 0.5)
    assert abs(found.value - float(brute.mean())) < 4 * error
    assert error < 0.1 * found.value


def test_feature_robustness_is_the_same_for_batches_precisions_and_orders_of_features():
    case = mlp((5, 6, 4, 3), bias=True, seed=3)
    cut = [(case.inputs[:4], case.targets[:4]), (case.inputs[4:], case.targets[4:])]
    whole = number(case, "feature_robustness")
    parts = isoflat.measure(case.net, cut, case.criterion, measure="feature_robustness")
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    summed = isoflat.measure(case.net, case.data, nn.CrossEntropyLoss(reduction="sum"), measure="feature_robustness")
    assert summed.value == pytest.approx(12 * whole.value, rel=1e-12)
    narrow = isoflat.measure(
        case.net.float(), (case.inputs.float(), case.targets), case.criterion, measure="feature_robustness"
    )
    assert narrow.value == pytest.approx(whole.value, rel=1e-3)
    assert number(case_double(case), "feature_robustness", seed=1).value != whole.value
    with pytest.raises(isoflat.UsageError, match="whole number of at least 2 draws"):
        number(case, "feature_robustness(draws=1)")
    with pytest.raises(isoflat.UsageError, match="positive delta"):
        number(case, "feature_robustness(delta=0)")


def case_double(case: Case) -> Case:
    return Case(case.net.double(), *case.data, case.criterion)
