"""The empirical risk is the same whatever the batches, and weighted by counted targets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import isoflat
from cases.networks import mlp
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network
from isoflat.risk.routes.reverse import Recomputed

LOSS = nn.CrossEntropyLoss()


def _value(net, data, loss, **options) -> float:
    return isoflat.measure(net, data, loss, geometry="layerwise", rtol=1e-8, **options).value


def _cut(case, sizes):
    return list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_batch_split_and_order_change_nothing(draws):
    case = mlp((4, 5, 3), bias=True, seed=draws.draw(st.integers(0, 50)), rows=20)
    whole = _value(case.net, case.data, case.criterion)
    cuts = draws.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    batches = _cut(case, [*cuts, 20 - sum(cuts)] if sum(cuts) < 20 else [20])
    assert _value(case.net, batches, case.criterion) == pytest.approx(whole, rel=1e-12)
    order = draws.draw(st.permutations(range(len(batches))))
    assert _value(case.net, [batches[j] for j in order], case.criterion) == pytest.approx(whole, rel=1e-12)
    memory = isoflat.Budget(memory=draws.draw(st.sampled_from([1 << 14, 1 << 30])))
    assert _value(case.net, batches, case.criterion, budget=memory) == pytest.approx(whole, rel=1e-12)


def test_batches_of_64_and_36_equal_one_of_100():
    """Averaging batch means would be off: the negative control computes that wrong number."""
    case = mlp((4, 6, 3), bias=False, seed=5, rows=100)
    truth = _value(case.net, case.data, case.criterion)
    batches = _cut(case, [64, 36])
    assert _value(case.net, batches, case.criterion) == pytest.approx(truth, rel=1e-12)
    naive = isoflat.BatchLoss(lambda model, batch: (nn.functional.cross_entropy(model(batch[0]), batch[1]), 1.0))
    assert abs(_value(case.net, batches, naive) - truth) > 1e-3 * truth


def test_duplicated_data_leave_means_and_double_sums():
    case = mlp((4, 5, 3), bias=True, seed=1)
    twice = (torch.cat([case.inputs] * 2), torch.cat([case.targets] * 2))
    assert _value(case.net, twice, nn.CrossEntropyLoss()) == pytest.approx(
        _value(case.net, case.data, nn.CrossEntropyLoss()), rel=1e-12
    )
    total = nn.CrossEntropyLoss(reduction="sum")
    assert _value(case.net, twice, total) == pytest.approx(2 * _value(case.net, case.data, total), rel=1e-12)
    assert _value(case.net, case.data, total) == pytest.approx(
        12 * _value(case.net, case.data, nn.CrossEntropyLoss()), rel=1e-12
    )


@pytest.mark.parametrize("rows", [3, 5, 12])
def test_ignored_targets_are_dropped_targets(rows):
    case = mlp((4, 5, 3), bias=True, seed=1)
    keep = torch.tensor([True, True, True, False, True, False, False, False, True, True, False, True])
    targets = torch.where(keep, case.targets, -100)
    batches = list(zip(case.inputs.split(rows), targets.split(rows), strict=True))
    table = isoflat.measure_all(
        case.net, batches, case.criterion, measures=["quotient_spectral_norm"], geometry="layerwise", rtol=1e-8
    )
    kept = _value(case.net, (case.inputs[keep], case.targets[keep]), case.criterion)
    assert table[0].estimate.value == pytest.approx(kept, rel=1e-12)
    assert table[0].point.targets == int(keep.sum())
    correct = case.net(case.inputs[keep]).argmax(1) == case.targets[keep]
    assert table[0].point.accuracy == pytest.approx(float(correct.double().mean()))


def test_a_batch_without_counted_targets_weighs_nothing():
    case = mlp((4, 5, 3), bias=True, seed=1)
    empty = (case.inputs[:3], torch.full((3,), -100))
    assert _value(case.net, [case.data, empty], case.criterion) == pytest.approx(
        _value(case.net, case.data, case.criterion), rel=1e-12
    )
    with pytest.raises(isoflat.DataError, match="no target counts"):
        _value(case.net, [empty], case.criterion)


def test_integer_class_weights_are_replicated_samples():
    case = mlp((4, 5, 3), bias=True, seed=1)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    repeats = weights.long()[case.targets]
    replicated = (case.inputs.repeat_interleave(repeats, 0), case.targets.repeat_interleave(repeats))
    assert _value(case.net, _cut(case, 5), nn.CrossEntropyLoss(weight=weights)) == pytest.approx(
        _value(case.net, replicated, case.criterion), rel=1e-12
    )


@pytest.mark.parametrize(
    "criterion",
    [
        nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(), nn.BCEWithLogitsLoss(), nn.SoftMarginLoss(),
        nn.functional.mse_loss, lambda output, target: (output - target).pow(4).mean(),
    ],
    ids=lambda loss: getattr(loss, "__name__", str(loss)),
)  # fmt: skip
def test_elementwise_losses_over_ragged_batches(criterion):
    """Every supported mean over elements equals its value on the whole data at once."""
    case = mlp((4, 5, 2), bias=True, seed=4, rows=11)
    targets = torch.rand(11, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = isoflat.measure_all(case.net, [(case.inputs, targets)], criterion, geometry="layerwise", rtol=1e-8)
    batches = list(zip(case.inputs.split(4), targets.split(4), strict=True))
    ragged = isoflat.measure_all(case.net, batches, criterion, geometry="layerwise", rtol=1e-8)
    expected = criterion(case.net(case.inputs), targets).item()
    assert ragged[0].point.loss == pytest.approx(expected, rel=1e-12)
    for one, other in zip(whole, ragged, strict=True):
        assert other.estimate.value == pytest.approx(one.estimate.value, rel=1e-10, abs=1e-14)


def test_every_form_of_data_gives_the_same_number():
    case = mlp((4, 5, 3), bias=True, seed=7)
    batches = _cut(case, 5)
    dataset = TensorDataset(*case.data)
    forms = [
        case.data,
        tuple(part.numpy() for part in case.data),
        batches,
        DataLoader(dataset, batch_size=5),
        dataset,
        lambda: iter(batches),
    ]
    values = [_value(case.net, form, case.criterion) for form in forms]
    assert values == pytest.approx([values[0]] * len(forms), rel=1e-12)


def test_batch_losses_on_dictionaries_and_models_with_a_loss():
    case = mlp((4, 5, 3), bias=True, seed=7)
    truth = _value(case.net, case.data, case.criterion)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = case.net

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    batches = [{"x": x, "labels": y} for x, y in _cut(case, 5)]
    assert _value(WithLoss(), batches, None) == pytest.approx(truth, rel=1e-12)
    summed = isoflat.BatchLoss(
        lambda model, batch: (
            nn.functional.cross_entropy(model.net(batch["x"]), batch["labels"], reduction="sum"),
            len(batch["x"]),
        )
    )
    assert _value(WithLoss(), batches, summed) == pytest.approx(truth, rel=1e-12)


def test_a_restricted_set_of_tensors_never_curves_more():
    """Cauchy interlacing: a principal block's top eigenvalue is at most the whole's."""
    case = mlp((4, 5, 3), bias=True, seed=7)
    options = {"measure": "quotient_largest_eigenvalue", "geometry": "layerwise"}
    whole = isoflat.measure(case.net, case.data, case.criterion, **options)
    parts = [
        isoflat.measure(case.net, case.data, case.criterion, params=selected, **options)
        for selected in ("0.*", ["2.weight"], lambda name, tensor: tensor.ndim == 1)
    ]
    assert all(part.lower <= whole.upper for part in parts)
    dense = case.frame()[:, None] * case.hessian() * case.frame()
    assert parts[0].value == pytest.approx(float(torch.linalg.eigvalsh(dense[:25, :25])[-1]), rel=1e-6)
    assert any("held fixed: 2.bias, 2.weight" in note for note in parts[0].notes)


def _products(case, loss, vectors):
    network = Network(case.net)
    return Recomputed(EmpiricalRisk(network, as_loss(loss), as_batches(case.data)), network.state()).products(vectors)


@pytest.mark.parametrize(("factor", "error"), [(2.0**40, 0.0), (2.0**-40, 0.0), (1e30, 1e-10), (1e-30, 1e-10)])
def test_a_multiple_of_the_loss_multiplies_everything(factor, error):
    case = mlp((4, 5, 3), bias=True, seed=4)
    cross = nn.functional.cross_entropy
    vectors = torch.randn(sum(case.sizes), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    once, many = (_products(case, lambda z, y, c=c: c * cross(z, y), vectors) for c in (1.0, factor))
    assert float((many / factor - once).abs().max()) <= error * float(once.abs().max())
    a, b = (
        isoflat.measure(case.net, case.data, lambda z, y, c=c: c * cross(z, y), geometry="layerwise", rtol=1e-6)
        for c in (1.0, factor)
    )
    for name in ("value", "lower", "upper", "residual"):
        assert getattr(b, name) / factor == pytest.approx(getattr(a, name), rel=max(error, 1e-14), abs=1e-9 * a.value)


def test_a_constant_in_the_loss_changes_no_bit_of_a_product():
    case = mlp((4, 5, 3), bias=True, seed=4)
    vectors = torch.eye(sum(case.sizes), dtype=torch.float64)
    plain, shifted = (_products(case, lambda z, y, c=c: LOSS(z, y) + c, vectors) for c in (0.0, 7.0))
    assert torch.equal(plain, shifted)


def test_a_penalty_on_weights_shifts_the_spectrum():
    """`(μ/2) ‖w‖²` adds μ to every eigenvalue of H, and μ D² to D H D."""
    case, mu = mlp((4, 5, 3), bias=True, seed=4), 0.3

    def penalised(model, batch):
        return LOSS(model(batch[0]), batch[1]) + mu / 2 * sum(p.square().sum() for p in model.parameters())

    loss = isoflat.BatchLoss(penalised)
    options = {"measure": "quotient_largest_eigenvalue", "rtol": 1e-9}
    shifted = isoflat.measure(case.net, [case.data], loss, geometry="euclidean", **options)
    plain = isoflat.measure(case.net, case.data, LOSS, geometry="euclidean", **options)
    assert shifted.value == pytest.approx(plain.value + mu, rel=1e-10)
    frame = case.frame()
    dense = frame[:, None] * (case.hessian() + mu * torch.eye(len(frame), dtype=torch.float64)) * frame
    seen = isoflat.measure(
        case.net, [case.data], loss, geometry="layerwise", measure="quotient_spectral_norm", rtol=1e-9
    )
    assert seen.value == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-10)


def test_value_and_gradient_are_means_over_counted_targets():
    """Against autograd on all rows at once, where batches differ in size and some targets are ignored."""
    case = mlp((4, 5, 3), bias=True, seed=6, rows=11)
    targets = torch.where(torch.arange(11) % 3 == 0, -100, case.targets)
    batches = list(zip(case.inputs.split(4), targets.split(4), strict=True))
    risk = EmpiricalRisk(Network(case.net), as_loss(LOSS), as_batches(batches))
    state = risk.network.state()
    loss = LOSS(case.net(case.inputs), targets)
    slopes = torch.autograd.grad(loss, list(case.net.parameters()))
    survey = risk.survey(state)
    assert risk.value(state) == pytest.approx(loss.item(), rel=1e-12)
    assert survey.loss == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(survey.gradient, torch.cat([slope.reshape(-1) for slope in slopes]), rtol=1e-10)


@pytest.mark.parametrize("shape", [(7,), (7, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_counts_of_rows_are_those_of_each_by_itself(shape, weighted):
    """Ignored targets and class weights, one target to a row or several; and losses where every row counts alike."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape[0], 3, *shape[1:], generator=generator)
    y = torch.randint(3, shape, generator=generator)
    y[0] = y.view(-1)[-1] = -100
    weight = torch.tensor([0.5, 1.0, 3.0]) if weighted else None
    for loss in (as_loss(nn.CrossEntropyLoss(weight=weight)), as_loss(nn.CrossEntropyLoss(weight=weight)).normalised()):
        each = [loss.count(z[i : i + 1], y[i : i + 1]) for i in range(len(z))]
        assert loss.row_counts(z, y).tolist() == each
        assert 0 in each
        alone = torch.stack([loss.summed(z[i : i + 1], y[i : i + 1]) for i in range(len(z))])
        assert torch.allclose(loss.by_row(z, y), alone, rtol=1e-6)
    assert as_loss(nn.MSELoss()).row_counts(z, z).tolist() == [z[0].numel()] * len(z)
