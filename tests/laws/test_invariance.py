"""What the number is proof against, what it is not, and what must change nothing."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import isoflat
from cases.networks import Case, cnn, mlp, scale
from isoflat.core.rng import stream
from isoflat.risk.network import Network
from isoflat.symmetry.groups.base import verify

MEASURES = ["quotient_spectral_norm", "quotient_sharpness", "quotient_trace", "riemannian_hessian_spectral_norm"]

logs = st.lists(st.floats(-3, 3), min_size=4, max_size=4)
powers = st.lists(st.integers(-10, 10), min_size=4, max_size=4)


def _case(seed: int, bias: bool, convolutional: bool) -> Case:
    return cnn(3, bias, seed) if convolutional else mlp((5, 6, 4, 3), bias, seed)


def _moved(case: Case, logarithms) -> tuple[Case, float]:
    """The case at another point of its orbit, and how much its output changed relative to its size."""
    state = Network(case.net).state()
    chain = isoflat.LayerScale.sequential(state)
    free = logarithms[: len(chain.weights) - 1]
    element = torch.tensor([*free, -math.fsum(free)], dtype=torch.float64).exp()
    moved = copy.deepcopy(case.net)
    moved.load_state_dict(chain.act(state, element).tensors)
    before, after = case.net(case.inputs), moved(case.inputs)
    change = float(((after - before).abs().max() / before.abs().max()).detach())
    return Case(moved, case.inputs, case.targets, case.criterion), change


def _numbers(case: Case, **options) -> list[isoflat.Estimate]:
    table = isoflat.measure_all(
        case.net, case.data, case.criterion, measures=MEASURES, geometry="layerwise", probes=4, **options
    )
    return [row.estimate for row in table]


@settings(deadline=None, max_examples=12)
@given(logs, st.integers(0, 100), st.booleans(), st.booleans())
def test_layer_factors_leave_outputs_and_numbers_alone(logarithms, seed, bias, convolutional):
    case = _case(seed, bias, convolutional)
    factors = [x * math.log(10) for x in logarithms]  # 1e-3 … 1e3
    moved, change = _moved(case, factors)
    assert change <= 1e-9
    for before, after in zip(_numbers(case), _numbers(moved), strict=True):
        size = max(abs(before.value), 1e-300)
        assert abs(after.value - before.value) <= 1e-9 * size
        assert abs(after.upper - before.upper) <= 1e-6 * size


@settings(deadline=None, max_examples=12)
@given(powers, st.integers(0, 100), st.booleans(), st.booleans(), st.booleans())
def test_powers_of_two_are_bit_identical(exponents, seed, bias, convolutional, single):
    case = _case(seed, bias, convolutional)
    if single:
        case = Case(case.net.float(), case.inputs.float(), case.targets, case.criterion)
    state = Network(case.net).state()
    chain = isoflat.LayerScale.sequential(state)
    free = exponents[: len(chain.weights) - 1]
    element = chain.element(*(2.0**e for e in free), 2.0 ** -sum(free))
    moved = copy.deepcopy(case.net)
    moved.load_state_dict(chain.act(state, element).tensors)
    assert torch.equal(case.net(case.inputs), moved(case.inputs))
    twin = Case(moved, case.inputs, case.targets, case.criterion)
    for before, after in zip(_numbers(case), _numbers(twin), strict=True):
        assert (before.value, before.lower, before.upper) == (after.value, after.lower, after.upper)
        assert (before.residual, before.standard_error) == (after.residual, after.standard_error)


def test_neuron_factors_move_it():
    """Negative control: the layer-wise metric is not proof against single neurons, nor the plain one against layers."""
    case = mlp((5, 6, 4, 3), bias=False, seed=1)
    units = torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    twin = Case(
        scale(copy.deepcopy(case.net), {"0.weight": units[:, None], "2.weight": 1 / units}), *case.data, case.criterion
    )
    assert torch.allclose(case.net(case.inputs), twin.net(case.inputs), rtol=1e-12)
    assert _numbers(twin)[0].lower > 2 * _numbers(case)[0].upper
    moved, _ = _moved(case, [math.log(100), 0])
    plain = [
        isoflat.measure(c.net, c.data, c.criterion, measure="hessian_spectral_norm", geometry="euclidean")
        for c in (case, moved)
    ]
    assert max(p.lower for p in plain) > 2 * min(p.upper for p in plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_papers_notebook(dtype, tolerance):
    """50-30-20-10 ReLU with biases, 500 Gaussian inputs, labels Binomial(9, ½); weights × (5, 4, 1/20)."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10)).to(dtype)
    inputs = torch.randn(500, 50, generator=generator).to(dtype)
    labels = torch.randint(0, 2, (500, 9), generator=generator).sum(1)
    twin = scale(
        copy.deepcopy(net),
        {"0.weight": 5.0, "2.weight": 4.0, "4.weight": 1 / 20, "0.bias": 5.0, "2.bias": 20.0, "4.bias": 1.0},
    )
    values = [
        isoflat.measure(model, (inputs, labels), nn.CrossEntropyLoss(), geometry="layerwise", rtol=1e-5).value
        for model in (net, twin)
    ]
    assert abs(values[1] - values[0]) <= tolerance * values[0]


def test_verify_proves_and_refutes():
    case = mlp((4, 5, 3), bias=True, seed=0)
    network = Network(case.net)

    def output(state):
        return network(state, lambda model: model(case.inputs))

    state = network.state()
    assert verify(isoflat.LayerScale.sequential(state), output, state, stream(0)) < 1e-12
    smooth = mlp((4, 5, 3), bias=True, seed=0, activation=nn.Tanh)
    tanh = Network(smooth.net)
    with pytest.raises(isoflat.SymmetryViolated, match="changes the network"):
        verify(
            isoflat.LayerScale.sequential(state), lambda s: tanh(s, lambda m: m(case.inputs)), tanh.state(), stream(0)
        )


def test_user_symmetries_are_verified_before_measuring():
    case = mlp((4, 5, 3), bias=True, seed=0)
    chain = isoflat.LayerScale(("0.weight", "2.weight"), ("0.bias", "2.bias"))
    isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise", symmetries=[chain])
    wrong = isoflat.LayerScale(("0.weight", "2.weight"), (None, "2.bias"))
    with pytest.raises(isoflat.SymmetryViolated):
        isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise", symmetries=[wrong])
    absent = isoflat.LayerScale(("0.weight", "9.weight"), (None, None))
    with pytest.raises(isoflat.SymmetryViolated, match=r"9\.weight"):
        isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise", symmetries=[absent])


@pytest.mark.parametrize("factor", [2.0**-40, 1e-14, 1e14, 2.0**30])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_scale_changes_nothing_but_the_scale(factor, dtype):
    case = mlp((5, 6, 4, 3), bias=True, seed=2)
    base, scaled = (
        isoflat.measure(
            case.net,
            case.data,
            isoflat.BatchLoss(
                lambda model, batch, c=c: (
                    c * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
                    len(batch[1]),
                )
            ),
            geometry="layerwise",
            dtype=dtype,
        )
        for c in (1.0, factor)
    )
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    assert scaled.converged
    for one, other in ((base.value, scaled.value), (base.upper, scaled.upper), (base.residual, scaled.residual)):
        exact = math.log2(factor).is_integer()
        assert (
            other == one * factor
            if exact
            else other == pytest.approx(one * factor, rel=tolerance, abs=tolerance * factor * base.value)
        )
    assert base.cost.products == scaled.cost.products


def test_same_seed_same_bits_and_other_seeds_intersect():
    case = mlp((5, 6, 4, 3), bias=True, seed=2)
    first, again = _numbers(case, seed=3)[0], _numbers(case, seed=3)[0]
    assert (first.value, first.lower, first.upper) == (again.value, again.lower, again.upper)
    other = _numbers(case, seed=4)[0]
    assert (other.value, other.upper) != (first.value, first.upper)  # two seeds may give one value to the last bit
    assert other.lower <= first.upper
    assert first.lower <= other.upper


def test_negative_dominant_curvature_keeps_its_sign():
    """A network whose loss curves down most: the norm is positive, the note and the signed measure say so."""
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    down = isoflat.BatchLoss(lambda model, batch: (-model(batch[0]).square().sum(), len(batch[0])))
    data = [(torch.eye(3, dtype=torch.float64), torch.zeros(3))]
    table = isoflat.measure_all(
        net, data, down, measures=["hessian_spectral_norm", "quotient_smallest_eigenvalue"], geometry="euclidean"
    )
    assert table[0].estimate.value == pytest.approx(2 / 3)
    assert table[1].estimate.value == pytest.approx(-2 / 3)
    assert any("negative" in note for note in table[0].estimate.notes)


def test_growing_all_weights_lowers_the_number_unless_scores_are_normalised():
    """Granziol's objection: a network that separates its classes is scaled by t, and loss and curvature go to zero."""
    case = mlp((5, 6, 4, 3), bias=False, seed=2)
    with torch.no_grad():
        sure = Case(case.net, case.inputs, case.net(case.inputs).argmax(1), case.criterion)
    grown = Case(scale(copy.deepcopy(case.net), {f"{i}.weight": 40.0 for i in (0, 2, 4)}), *sure.data, case.criterion)
    for geometry in ("layerwise", "auto"):
        plain = [isoflat.measure(c.net, c.data, c.criterion, geometry=geometry).value for c in (sure, grown)]
        kept = [
            isoflat.measure(c.net, c.data, c.criterion, geometry=geometry, logits="normalised").value
            for c in (sure, grown)
        ]
        assert plain[1] < 0.1 * plain[0]
        assert kept[1] == pytest.approx(kept[0], rel=1e-3)
        assert kept[0] > 0
    with pytest.raises(isoflat.UsageError, match="class scores"):
        isoflat.measure(case.net, (case.inputs, torch.randn(12, 3).double()), nn.MSELoss(), logits="normalised")
    with pytest.raises(isoflat.UsageError, match="must be 'normalised'"):
        isoflat.measure(case.net, case.data, case.criterion, logits="yes")
