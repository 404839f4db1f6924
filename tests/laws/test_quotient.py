"""The quotient manifold: metric, vertical and horizontal space, Riemannian gradient and Hessian."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import isoflat
from cases.networks import mlp
from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense
from isoflat.risk.network import Network


def _quotient(seed: int, bias: bool):
    case = mlp((4, 5, 4, 3), bias, seed)
    state = Network(case.net).state()
    return case, isoflat.Quotient(isoflat.LayerScale.sequential(state), state)


def _random(n: int, seed: int):
    return torch.randn(n, generator=stream(seed, "tangent"), dtype=torch.float64)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.booleans())
def test_projections_split_the_tangent_space(seed, bias):
    case, quotient = _quotient(seed, bias)
    a, b = _random(len(case.weights), seed), _random(len(case.weights), seed + 1)
    up, across = quotient.vertical(a), quotient.horizontal(a)
    scale = quotient.inner(a, a)
    assert torch.allclose(up + across, a, rtol=1e-12)
    assert abs(quotient.inner(up, across)) <= 1e-12 * scale
    assert quotient.inner(across, across) + quotient.inner(up, up) == pytest.approx(scale, rel=1e-10)
    again = quotient.horizontal(across)
    assert quotient.inner(again - across, again - across) <= 1e-20 * scale
    assert quotient.inner(quotient.horizontal(a), b) == pytest.approx(
        quotient.inner(a, quotient.horizontal(b)), rel=1e-9, abs=1e-9 * scale
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.booleans())
def test_generators_are_vertical_and_move_along_the_orbit(seed, bias):
    """The derivative of the action at the identity is the generator; the output does not change along it."""
    case, quotient = _quotient(seed, bias)
    chain, state = quotient.symmetry, quotient.state
    generators = chain.generators(state)
    assert generators.shape == (len(case.weights), chain.dimension)
    step = 1e-6
    logs = torch.tensor([step, -step, 0.0], dtype=torch.float64)
    moved = chain.act(state, logs.exp()).vector
    back = chain.act(state, (-logs).exp()).vector
    assert torch.allclose((moved - back) / (2 * step), generators[:, 0], atol=1e-8)
    for column in generators.T:
        across = quotient.horizontal(column)
        assert quotient.inner(across, across) <= 1e-20 * quotient.inner(column, column)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.booleans())
def test_metric_and_gradient_are_invariant(seed, bias):
    """The action is an isometry, and the Riemannian gradient is horizontal and moves with it."""
    case, quotient = _quotient(seed, bias)
    chain, state = quotient.symmetry, quotient.state
    element = chain.sample(stream(seed, "orbit"), spread=1.0)
    there = isoflat.Quotient(chain, chain.act(state, element))
    factors = there.state.vector / state.vector
    a, b = _random(len(case.weights), seed), _random(len(case.weights), seed + 1)
    assert there.inner(factors * a, factors * b) == pytest.approx(quotient.inner(a, b), rel=1e-9, abs=1e-9)
    euclidean = case.gradient()
    gradient = quotient.gradient(euclidean)
    assert quotient.inner(gradient, gradient) == pytest.approx(float(euclidean @ gradient), rel=1e-10)
    up = quotient.vertical(gradient)
    assert quotient.inner(up, up) <= 1e-18 * quotient.inner(gradient, gradient)
    moved = there.gradient(euclidean / factors)
    assert torch.allclose(moved, factors * gradient, rtol=1e-9, atol=1e-12 * float(moved.abs().max()))


@pytest.mark.parametrize("seed", range(10))
def test_gauge_directions_lie_in_the_kernel_of_the_covariant_hessian(seed):
    """Without biases D(H + C)D kills every vertical direction exactly; D H D does not (negative control)."""
    case, quotient = _quotient(seed, bias=False)
    plain = case.frame()[:, None] * case.hessian() * case.frame()
    covariant = plain + case.connection()
    vertical = quotient.vertical_frame
    assert vertical.shape[1] == 2
    size = float(torch.linalg.matrix_norm(plain, 2))
    assert float((covariant @ vertical).abs().max()) <= 1e-12 * size
    assert float((plain @ vertical).abs().max()) > 1e-4 * size
    projected = quotient.hessian(Dense(case.hessian()), case.gradient())
    dense = projected.matmat(torch.eye(len(case.weights), dtype=torch.float64))
    assert torch.allclose(dense, covariant, atol=1e-11 * size)


@pytest.mark.parametrize("bias", [False, True])
def test_vertical_identity_of_the_hessian(bias):
    """H Xθ = −Xᵀ∇L at any point: a check of the products that needs no oracle."""
    case, quotient = _quotient(4, bias)
    generators = quotient.symmetry.generators(quotient.state)
    rates = generators / case.weights[:, None]
    defect = case.hessian() @ generators + rates * case.gradient()[:, None]
    assert float(defect.abs().max()) <= 1e-12 * float(case.gradient().abs().max())
    assert float((case.gradient() @ generators).abs().max()) <= 1e-13


def test_covariant_hessian_is_the_second_derivative_along_geodesics():
    """Each block moves on a cylinder ℝ × sphere: radius e^{at}, angle bt. Second differences agree."""
    case = mlp((3, 4, 2), bias=False, seed=1)
    blocks = case.weights.split(case.sizes)
    direction = _random(len(case.weights), 3)
    direction = direction / direction.norm()

    def point(t: float):
        moved = []
        for w, u in zip(blocks, direction.split(case.sizes), strict=True):
            unit = w / w.norm()
            tangent = u - (u @ unit) * unit
            angle = tangent.norm() * t
            turned = torch.cos(angle) * unit + torch.sin(angle) * tangent / tangent.norm()
            moved.append(w.norm() * torch.exp((u @ unit) * t) * turned)
        return case.loss(torch.cat(moved))

    h = 1e-4
    second = float((point(h) - 2 * point(0.0) + point(-h)) / h**2)
    frame = case.frame()
    covariant = float(direction @ ((frame[:, None] * case.hessian() * frame + case.connection()) @ direction))
    plain = float(direction @ (frame * (case.hessian() @ (frame * direction))))
    assert second == pytest.approx(covariant, rel=1e-5)
    assert abs(second - plain) > 1e-2 * abs(second)


def test_a_zero_block_drops_out():
    case, _ = _quotient(0, bias=True)
    with torch.no_grad():
        case.net[0].bias.zero_()
    state = Network(case.net).state()
    quotient = isoflat.Quotient(isoflat.LayerScale.sequential(state), state)
    a = quotient.horizontal(_random(len(case.weights), 0))
    assert bool(torch.isfinite(a).all())
    assert float(a[20:25].abs().max()) == 0
