"""The local learning coefficient against closed forms and quadrature."""

import math

import pytest
import torch
from torch import nn

import isoflat
from cases.networks import Case, mlp, scale

DOUBLE = torch.float64


def number(case: Case, options: str, geometry="euclidean", **further) -> isoflat.Estimate:
    measure = f"local_learning_coefficient({options})"
    return isoflat.measure(case.net, case.data, case.criterion, measure=measure, geometry=geometry, **further)


def parabola(width: int = 4, rows: int = 20, solved: bool = True) -> Case:
    """Least squares."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(rows, k, generator=generator, dtype=DOUBLE) for k in (width, 1))
    case = Case(nn.Linear(width, 1, bias=False, dtype=DOUBLE), inputs, targets, nn.MSELoss())
    with torch.no_grad():
        best = torch.linalg.lstsq(inputs, targets).solution.T
        case.net.weight.copy_(best if solved else best + 1)
    return case


@pytest.mark.parametrize(("geometry", "localisation"), [("euclidean", 0.1), ("layerwise", 10.0)])
def test_of_a_parabola_it_is_half_its_directions(geometry, localisation):
    """`½ Σ nβλ/(nβλ + γ)`, a tenth more or less for steps that are not small."""
    case = parabola()
    unit = float(case.weights.norm()) ** 2 if geometry == "layerwise" else 1.0
    curved = 20 / math.log(20) * unit * torch.linalg.eigvalsh(case.hessian())
    truth = float((curved / (curved + localisation)).sum()) / 2
    found = number(case, f"localisation={localisation}, draws=120, burn=40, chains=5, rows=20", geometry)
    assert found.lower <= 1.1 * truth
    assert found.upper >= 0.9 * truth
    assert found.upper - found.lower <= truth


class Product(nn.Module):
    """`u v x`: at the origin two directions, of which the loss feels less than one."""

    def __init__(self):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.zeros(1, dtype=DOUBLE)) for _ in range(2))

    def forward(self, x):
        return self.u * self.v * x


def test_of_a_singular_point_it_is_what_quadrature_says():
    """`E nβ c u²v²` under `exp(−nβ c u²v² − γ (u² + v²)/2)`; steps lengthen both directions by a twentieth or more."""
    rows, localisation = 300, 20.0
    case = Case(Product(), torch.ones(rows, 1, dtype=DOUBLE), torch.zeros(rows, 1, dtype=DOUBLE), nn.MSELoss())
    grid = torch.linspace(-3, 3, 1501, dtype=DOUBLE)
    rise = rows / math.log(rows) * grid[:, None].square() * grid.square()
    density = (-rise - localisation / 2 * (grid[:, None].square() + grid.square())).exp()
    truth = float((rise * density).sum() / density.sum())
    found = number(case, f"localisation={localisation}, draws=500, burn=20, chains=5, rows={rows}")
    assert found.lower <= 1.3 * truth
    assert found.upper >= truth
    assert found.upper - found.lower <= truth
    with pytest.raises(isoflat.UsageError, match="ran away: raise localisation"):
        number(case, f"localisation=1, rows={rows}")


def test_chains_are_the_same_for_one_seed_and_follow_a_rescaling():
    case = mlp((5, 6, 3), bias=False, seed=3)
    options = "chains=2, draws=10, burn=10, rows=8"
    first, second, other = (number(case, options, "layerwise", seed=seed) for seed in (1, 1, 2))
    assert first.samples == second.samples != other.samples
    plain = number(case, options, seed=1)
    scale(case.net, {"0.weight": 7.0, "2.weight": 1 / 7})
    assert number(case, options, "layerwise", seed=1).samples == pytest.approx(first.samples, rel=1e-9)
    assert number(case, options, seed=1).samples != pytest.approx(plain.samples, rel=0.1)


def test_chains_that_have_not_settled_and_points_that_are_no_minimum_say_so():
    case = parabola(width=40, rows=60)
    case.inputs[:, 1:] *= 0.05  # flat directions, along which steps that the steep one allows lead nowhere soon
    with torch.no_grad():
        case.net.weight.copy_(torch.linalg.lstsq(case.inputs, case.targets).solution.T)
    started = number(case, "localisation=0.001, draws=200, burn=0, rows=60")
    assert any("raise burn" in note for note in started.notes)
    high = number(parabola(solved=False), "localisation=0.1, draws=50, burn=50, rows=20")
    assert high.value < 0
    assert any("no minimum" in note for note in high.notes)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(isoflat.UsageError, match="positive localisation"):
        number(parabola(), "localisation=0")
    alone = parabola(rows=1, solved=False)
    with pytest.raises(isoflat.UsageError, match="1 example"):
        number(alone, "rows=1")


def learning_coefficient(inputs: int, hidden: int, outputs: int, rank: int) -> float:
    """Of reduced-rank regression (Aoyagi and Watanabe 2005): λ of `‖B A x − B₀ A₀ x‖²/2`, B₀ A₀ of this rank."""
    m, h, n, r = inputs, hidden, outputs, rank
    if m + h < n + r:
        return (h * m - h * r + n * r) / 2
    if n + h < m + r:
        return (h * n - h * r + m * r) / 2
    if m + n < h + r:
        return m * n / 2
    return (2 * (h + r) * (m + n) + 2 * m * n - (h + r) ** 2 - m**2 - n**2 + (m + n + h + r) % 2) / 8


@pytest.mark.parametrize(
    ("shape", "rank"), [((5, 3, 5), 3), ((5, 3, 5), 1), pytest.param((4, 3, 8), 1, marks=pytest.mark.slow)]
)
def test_reduced_rank_regression(shape, rank):
    """Regular up to a change of basis at full rank, singular below it; labels are the network's own, so that this is a minimum."""
    generator = torch.Generator().manual_seed(1)
    m, h, n = shape
    net = nn.Sequential(nn.Linear(m, h, bias=False), nn.Linear(h, n, bias=False)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        net[0].weight[rank:] = 0
        net[1].weight[:, rank:] = 0
        x = torch.randn(500, m, generator=generator, dtype=torch.float64)
        data = x, net(x)
    found = isoflat.measure(
        net, data, lambda z, y: 0.5 * (z - y).square().sum(1).mean(), geometry="euclidean",
        measure="local_learning_coefficient(chains=6, draws=150, burn=150, localisation=1, rows=500)",
    )  # fmt: skip
    truth = learning_coefficient(*shape, rank)
    # Steps of finite length add about a tenth; localisation takes one where the minimum is singular.
    assert found.lower <= 1.1 * truth
    assert 0.9 * truth <= found.upper
    assert found.upper - found.lower < truth / 2
