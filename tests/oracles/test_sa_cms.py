"""Scale-adaptive central moments of the loss against those of quadratic forms in Gaussian numbers."""

import math

import pytest
import torch
from torch import nn

import isoflat
from cases.networks import Case, mlp

DOUBLE = torch.float64


def number(case: Case, options: str = "", **further) -> isoflat.Estimate:
    measure = f"sa_cms({options})"
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, geometry="euclidean", **further)


def parabola() -> Case:
    generator = torch.Generator().manual_seed(0)
    inputs, targets, weight = (
        torch.randn(size, generator=generator, dtype=DOUBLE) for size in ((30, 6), (30, 1), (1, 6))
    )
    case = Case(nn.Linear(6, 1, bias=False, dtype=DOUBLE), inputs, targets, nn.MSELoss())
    with torch.no_grad():
        case.net.weight.copy_(weight)
    return case


def cumulants(case: Case, sigma: float) -> tuple[float, float, float]:
    """Second, third and fourth of `σ bᵀD z + σ²/2 zᵀ D A D z`, b the gradient and A the Hessian."""
    size = case.weights
    slope, curved = sigma * size * case.gradient(), sigma**2 * size[:, None] * case.hessian() * size
    values, vectors = torch.linalg.eigh(curved)
    along = (vectors.T @ slope).square()
    return tuple(
        float(
            math.factorial(r - 1) / 2 * values.pow(r).sum() + math.factorial(r) / 2 * (values.pow(r - 2) * along).sum()
        )
        for r in (2, 3, 4)
    )


def test_the_second_cumulant_is_that_of_its_formula():
    """`σ² ‖D b‖² + σ⁴/2 ‖D A D‖²`: the general ones agree with it."""
    case, sigma = parabola(), 0.3
    size = case.weights
    curved = size[:, None] * case.hessian() * size
    truth = sigma**2 * (size * case.gradient()).square().sum() + sigma**4 / 2 * curved.square().sum()
    assert cumulants(case, sigma)[0] == pytest.approx(float(truth), rel=1e-12)


@pytest.mark.parametrize(("sigma", "draws"), [(0.05, 32), (0.5, 100)])
def test_intervals_cover_moments_of_a_parabola(sigma, draws):
    """Squares of noise have long tails, and need more draws."""
    case = parabola()
    second, _, _ = cumulants(case, sigma)
    truth = math.sqrt(second)
    found = [number(case, f"sigma={sigma}, draws={draws}", seed=seed) for seed in range(40)]
    covered = sum(part.lower <= truth <= part.upper for part in found)
    assert covered >= 34  # 38 are expected
    mean = sum(part.value for part in found) / len(found)
    assert mean == pytest.approx(truth, rel=0.05)


def test_higher_orders():
    case, sigma = parabola(), 0.5
    second, third, fourth = cumulants(case, sigma)
    asked = [f"sa_cms(sigma={sigma}, order={order}, draws=2000)" for order in (3, 4)]
    table = isoflat.measure_all(case.net, case.data, case.criterion, measures=asked, geometry="euclidean")
    for row, order, moment in zip(table, (3, 4), (third, fourth + 3 * second**2), strict=True):
        found = row.estimate
        assert found.value == pytest.approx(moment ** (1 / order), abs=4 * found.standard_error)
        assert found.standard_error < 0.1 * found.value


def test_it_is_a_mean_of_samples_and_the_same_for_one_seed():
    case = mlp((5, 6, 3), bias=True, seed=3)
    one, same, other = (number(case, seed=seed) for seed in (0, 0, 1))
    assert one.samples == same.samples != other.samples
    assert one.value == pytest.approx(sum(one.samples) / len(one.samples), rel=1e-12)
    assert len(one.samples) == 32


def test_float32_weights_are_perturbed_in_float64():
    """Noise that float32 does not resolve in the loss."""
    case = parabola()
    narrow = Case(case.net.float(), case.inputs.float(), case.targets.float(), case.criterion)
    found = number(narrow, "sigma=1e-6, draws=200")
    wide = Case(narrow.net.double(), narrow.inputs.double(), narrow.targets.double(), case.criterion)
    assert found.value == pytest.approx(math.sqrt(cumulants(wide, 1e-6)[0]), abs=4 * found.standard_error)


@pytest.mark.parametrize("options", ["sigma=0", "order=1", "order=2.5", "draws=2"])
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(isoflat.UsageError, match="sa_cms takes"):
        number(parabola(), options)


def test_a_loss_that_overflows_is_refused():
    case = Case(nn.Linear(1, 1, bias=False, dtype=DOUBLE), *torch.ones(2, 4, 1, dtype=DOUBLE), nn.MSELoss())
    with pytest.raises(isoflat.NonFinite, match="lower its sigma"):
        number(case, "sigma=1e200")
