"""The ground-truth table of the 2-3-2 network and the closed forms, each recomputed from dense matrices."""

import math

import pytest
import torch
from torch import nn

import isoflat
from cases.networks import Case, micro, mlp, scale
from isoflat.geometry.layerwise import Connection, stationarity
from isoflat.linalg.operator import Dense
from isoflat.risk.network import Network

BASE = {
    "hessian": 0.429806701294,
    "hessian_trace": 0.817411275793,
    "top": 3.375561257845,
    "bottom": -0.133348691634,
    "trace": 6.432131102526,
    "report": 1.595345479073,
    "covariant": 3.500043976059,
    "covariant_bottom": 0.0,
    "covariant_trace": 7.569821348619,
}
LAYERS = {**BASE, "hessian": 6.137717923126, "hessian_trace": 10.399813240712}
NEURONS = {
    "hessian": 1.449019658463,
    "hessian_trace": 2.890732659520,
    "top": 26.132349663144,
    "bottom": -0.179571818520,
    "trace": 46.455235514362,
    "report": 12.350576010365,
    "covariant": 26.229129771194,
    "covariant_bottom": -0.021385048141,
    "covariant_trace": 47.592925760454,
}


def _rescaled(column: str) -> Case:
    case = micro()
    if column == "layers":
        scale(case.net, {"0.weight": 5.0, "2.weight": 0.2})
    if column == "neurons":
        units = torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64)
        scale(case.net, {"0.weight": units[:, None], "2.weight": 1 / units})
    return case


COLUMNS = pytest.mark.parametrize(("column", "truth"), [("base", BASE), ("layers", LAYERS), ("neurons", NEURONS)])


@COLUMNS
def test_table_through_the_public_face(column, truth):
    case = _rescaled(column)
    names = {
        "hessian_spectral_norm": "hessian",
        "quotient_spectral_norm": "top",
        "quotient_largest_eigenvalue": "top",
        "quotient_smallest_eigenvalue": "bottom",
        "quotient_sharpness(epsilon=1)": "report",
        "riemannian_hessian_spectral_norm": "covariant",
    }
    table = isoflat.measure_all(
        case.net, case.data, case.criterion, measures=list(names), geometry="layerwise", rtol=1e-11
    )
    for row, key in zip(table, names.values(), strict=True):
        assert row.estimate.value == pytest.approx(truth[key], rel=1e-9), row.measure
        assert row.estimate.lower - 1e-12 <= truth[key] <= row.estimate.upper + 1e-12
    assert table[0].point.loss == pytest.approx(0.057940522013, rel=1e-9)


@COLUMNS
def test_table_from_dense_matrices(column, truth):
    """Independent of the library: the table's numbers are those of the definitions."""
    case = _rescaled(column)
    hessian, frame, loss = case.hessian(), case.frame(), float(case.loss(case.weights))
    quotient = frame[:, None] * hessian * frame
    covariant = quotient + case.connection()
    found = {
        "hessian": torch.linalg.eigvalsh(hessian)[-1],
        "hessian_trace": hessian.trace(),
        "top": torch.linalg.eigvalsh(quotient)[-1],
        "bottom": torch.linalg.eigvalsh(quotient)[0],
        "trace": quotient.trace(),
        "report": torch.linalg.eigvalsh(quotient)[-1] / (2 + 2 * loss),
        "covariant": torch.linalg.eigvalsh(covariant)[-1],
        "covariant_bottom": torch.linalg.eigvalsh(covariant)[0],
        "covariant_trace": covariant.trace(),
    }
    for key, value in truth.items():
        assert float(found[key]) == pytest.approx(value, rel=1e-9, abs=1e-12 * float(found["top"])), key


@COLUMNS
def test_traces_from_the_librarys_products(column, truth):
    """Exact traces by unit vectors, so that no sampling error hides a wrong product."""
    case = _rescaled(column)
    state = Network(case.net).state()
    layerwise = isoflat.geometry.layerwise.GEOMETRY
    frame = layerwise.frame(state)
    identity = torch.eye(12, dtype=torch.float64)
    hessian = Dense(case.hessian())
    assert hessian.matmat(identity).trace().item() == pytest.approx(truth["hessian_trace"], rel=1e-9)
    quotient = frame.pull(hessian.matmat(frame.push(identity)))
    assert quotient.trace().item() == pytest.approx(truth["trace"], rel=1e-9)
    plus = layerwise.connection(state, case.gradient()).matmat(identity)
    assert (quotient + plus).trace().item() == pytest.approx(truth["covariant_trace"], rel=1e-9)


def test_trace_estimates_cover_the_table():
    case = micro()
    for geometry, truth in (("layerwise", BASE["trace"]), ("euclidean", BASE["hessian_trace"])):
        estimate = isoflat.measure(
            case.net, case.data, case.criterion, measure="quotient_trace", geometry=geometry, confidence=1 - 1e-6
        )
        assert estimate.lower <= truth <= estimate.upper
        assert estimate.standard_error > 0


def test_trace_correction_is_the_closed_form():
    """Tr(D C D) = Σ (2 − n_i) ⟨g_i, W_i⟩; here 2·(2 − 6)·(−0.142211280762)."""
    case = micro()
    products = [
        float(g @ w) for g, w in zip(case.gradient().split(case.sizes), case.weights.split(case.sizes), strict=True)
    ]
    assert products == pytest.approx([-0.142211280762] * 2, rel=1e-9)  # Euler: equal in every layer
    assert case.connection().trace().item() == pytest.approx(sum((2 - 6) * p for p in products), rel=1e-12)
    assert BASE["covariant_trace"] - BASE["trace"] == pytest.approx(1.137690246093, rel=1e-9)


def _scalar_net(u: float, v: float) -> nn.Module:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(u)
        net[1].weight.fill_(v)
    return net


@pytest.mark.parametrize(("u", "v", "y"), [(2.0, 0.5, 1.0), (0.5, 0.5, 1.0), (0.2, 1.0, 1.0), (3.0, 2.0, 1.0)])
def test_closed_form_of_the_scalar_net(u, v, y):
    """L = ½(uv − y)²: D H D has 2p² + pr and −pr; the covariant Hessian 2(p² + pr) and 0; p = uv, r = p − y."""
    half = isoflat.BatchLoss(lambda model, batch: (0.5 * (model(batch[0]) - batch[1]).square().sum(), len(batch[0])))
    data = [(torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), y, dtype=torch.float64))]
    p, r = u * v, u * v - y

    def number(measure, geometry="layerwise"):
        return isoflat.measure(_scalar_net(u, v), data, half, measure=measure, geometry=geometry, rtol=1e-10).value

    both = sorted([2 * p * p + p * r, -p * r])
    assert number("quotient_smallest_eigenvalue") == pytest.approx(both[0], rel=1e-9, abs=1e-12)
    assert number("quotient_largest_eigenvalue") == pytest.approx(both[1], rel=1e-9)
    covariant = 2 * (p * p + p * r)
    assert number("riemannian_hessian_spectral_norm") == pytest.approx(abs(covariant), rel=1e-9)
    if r == 0:
        assert number("hessian_spectral_norm") == pytest.approx(u * u + v * v, rel=1e-9)
        assert number("quotient_spectral_norm") == pytest.approx(2 * y * y, rel=1e-9)


def test_gauge_rayleigh_quotient():
    """For the metric-unit vector v = (W_1, −W_2, 0, …)/√2: vᵀ D H D v = −(⟨g_1, W_1⟩ + ⟨g_2, W_2⟩)/2."""
    case = mlp((4, 5, 6, 3), bias=False, seed=3)
    weights, gradients = case.weights.split(case.sizes), case.gradient().split(case.sizes)
    gauge = torch.cat([weights[0] / weights[0].norm(), -weights[1] / weights[1].norm(), 0 * weights[2]]) / math.sqrt(2)
    frame = case.frame()
    value = gauge @ (frame * (case.hessian() @ (frame * gauge)))
    expected = -(weights[0] @ gradients[0] + weights[1] @ gradients[1]) / 2
    assert float(value) == pytest.approx(float(expected), rel=1e-10)
    assert abs(float(expected)) > 0.01  # the artefact is there: without the connection term the gauge is curved
    products = [float(w @ g) for w, g in zip(weights, gradients, strict=True)]
    assert products == pytest.approx([products[0]] * 3, rel=1e-10)


@pytest.mark.parametrize("classes", [2, 5])
def test_softmax_regression_at_zero(classes):
    """H = (I/K − 11ᵀ/K²) ⊗ E[xxᵀ] at W = 0: λ_max = λ_max(E xxᵀ)/K and trace (1 − 1/K) E‖x‖²."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, classes, (40,), generator=generator)
    net = nn.Linear(4, classes, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    second = inputs.T @ inputs / 40
    value = isoflat.measure(
        net, (inputs, targets), nn.CrossEntropyLoss(), measure="hessian_spectral_norm", rtol=1e-9
    ).value
    assert value == pytest.approx(float(torch.linalg.eigvalsh(second)[-1]) / classes, rel=1e-9)
    trace = isoflat.measure(
        net,
        (inputs, targets),
        nn.CrossEntropyLoss(),
        measure="quotient_trace",
        geometry="euclidean",
        confidence=1 - 1e-6,
    )
    assert trace.lower <= (1 - 1 / classes) * float(second.trace()) <= trace.upper
    quotient = isoflat.measure(net, (inputs, targets), nn.CrossEntropyLoss(), geometry="layerwise")
    assert quotient.value == 0
    assert any("weight" in note and "zero" in note for note in quotient.notes)


def test_connection_norm_is_the_stationarity_bound():
    """‖D C D‖ = max_i ‖W_i‖ ‖g_i‖ = b, for random points and gradients."""
    for seed in range(20):
        case = mlp((3, 4, 2), bias=True, seed=seed)
        state = Network(case.net).state()
        gradient = torch.randn(state.space.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        dense = Connection(state.space, state.vector, gradient).matmat(torch.eye(state.space.size, dtype=torch.float64))
        assert torch.equal(dense, dense.T)
        assert float(torch.linalg.matrix_norm(dense, 2)) == pytest.approx(stationarity(state, gradient), rel=1e-12)
