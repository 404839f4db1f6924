"""Two hundred small networks against LAPACK on the dense Hessian."""

from dataclasses import replace

import pytest
import torch

import isoflat
from cases.networks import cnn, mlp
from isoflat.curvature.matrix import Curvature
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.linearise import linearise
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, exactly
from isoflat.risk.plan import plan
from isoflat.risk.routes.differences import Differences
from isoflat.risk.routes.forward import Forward
from isoflat.risk.routes.reverse import Recomputed

MEASURES = [
    "hessian_spectral_norm",
    "quotient_largest_eigenvalue",
    "quotient_smallest_eigenvalue",
    "quotient_spectral_norm",
    "riemannian_hessian_spectral_norm",
]


def _case(seed: int):
    bias = seed % 2 == 0
    if seed % 4 < 2:
        depth = 2 + seed % 3
        return mlp((3 + seed % 4, *[3 + (seed + j) % 4 for j in range(depth - 1)], 2 + seed % 3), bias, seed)
    return cnn(2 + seed % 3, bias, seed)


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 10))])
def test_both_ends_of_200_random_networks(block):
    for seed in range(20 * block, 20 * block + 20):
        case = _case(seed)
        hessian, frame = case.hessian(), case.frame()
        plain = torch.linalg.eigvalsh(hessian)
        quotient = torch.linalg.eigvalsh(frame[:, None] * hessian * frame)
        covariant = torch.linalg.eigvalsh(frame[:, None] * hessian * frame + case.connection())
        truths = [
            float(plain.abs().max()),
            float(quotient[-1]),
            float(quotient[0]),
            float(quotient.abs().max()),
            float(covariant.abs().max()),
        ]
        table = isoflat.measure_all(
            case.net,
            case.data,
            case.criterion,
            measures=MEASURES,
            geometry="layerwise",
            rtol=1e-10,
            budget=600,
            seed=seed,
        )
        for row, truth in zip(table, truths, strict=True):
            estimate = row.estimate
            assert estimate.value == pytest.approx(truth, rel=1e-9), (seed, row.measure)
            # LAPACK's own backward error, a few eps of the norm, is all that is added to the interval.
            slack = 50 * torch.finfo(torch.float64).eps * float(quotient.abs().max() + plain.abs().max())
            assert estimate.lower - slack <= truth <= estimate.upper + slack, (seed, row.measure)


def _kept(risk, state):
    made = linearise(risk, state, plan(risk, state, Recomputed, rows=len(list(risk.batches)), memory=1 << 40))
    assert "kept" in made.route
    return made


def _cut(risk, state):
    return Recomputed(replace(risk, batches=risk.batches.cut(2)), state)


@pytest.mark.parametrize(
    ("route", "error"), [(_kept, 1e-12), (Recomputed, 1e-12), (_cut, 1e-12), (Forward, 1e-12), (Differences, 1e-5)]
)
def test_products_are_those_of_the_dense_hessian(route, error):
    for seed in range(8):
        case = _case(seed)
        state = Network(case.net).state()
        risk = EmpiricalRisk(Network(case.net), as_loss(case.criterion), as_batches(case.data, rows=5))
        identity = torch.eye(state.space.size, dtype=torch.float64)
        product = Curvature(route(risk, state)).matmat(identity)
        truth = case.hessian()
        assert float((product - truth).abs().max()) <= error * float(truth.abs().max())
        with exactly(state.device):
            survey = risk.survey(state)
        assert float((survey.gradient - case.gradient()).abs().max()) <= 1e-12 * float(case.gradient().abs().max())


def test_float32_is_certified_in_float64():
    """The value of a float32 run agrees with an all-float64 one far below float32's noise."""
    for seed in range(6):
        case = _case(seed)
        single = isoflat.measure(case.net.float(), case.data, case.criterion, geometry="layerwise", rtol=1e-4)
        double = isoflat.measure(case.net, case.data, case.criterion, geometry="layerwise", rtol=1e-4, dtype="float64")
        assert single.value == pytest.approx(double.value, rel=1e-9)
        assert single.lower <= double.upper
        assert double.lower <= single.upper
