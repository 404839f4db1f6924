"""The Frobenius norm: variance, deflation with its cross terms, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense
from isoflat.linalg.trace.frobenius import Frobenius
from isoflat.linalg.vectors import Distribution

N = 60
KNOWN = {
    "bulk": np.linspace(0, 1, N),
    "indefinite": np.linspace(-1, 0.7, N),
    "decay": 0.8 ** np.arange(N),
    "outliers": np.concatenate([[1e3, -3e2, 40], np.linspace(0, 1, N - 3)]),
    "power law": np.arange(1, N + 1) ** -2.0,
}


def rotated(values, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense matrix with these eigenvalues in a random orthonormal basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    matrix = (eigenvectors(len(values)) * values) @ eigenvectors(len(values)).T
    return ((matrix + matrix.T) / 2).to(dtype)


def eigenvectors(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=stream(0, "basis"), dtype=torch.float64))[0]


def lengths(matrix: Tensor, out: Tensor, probes: int, distribution: Distribution, seed: object) -> Tensor:
    """`‖P A P v‖` of many probes."""
    away = torch.eye(len(matrix), dtype=torch.float64) - out @ out.T
    return (away @ matrix @ away @ distribution.columns(len(matrix), probes, stream(1, seed))).norm(dim=0)


def spans() -> dict[str, Tensor]:
    """No directions, eigenvectors, and directions that mix with everything else."""
    mixed, _ = torch.linalg.qr(torch.randn(N, 4, generator=stream(9), dtype=torch.float64))
    return {"none": torch.empty(N, 0, dtype=torch.float64), "eigenvectors": eigenvectors(N)[:, :3], "any": mixed}


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("span", spans())
@pytest.mark.parametrize("name", KNOWN)
def test_equals_the_definition(name, span, distribution):
    """Value, samples and interval from the blocks of the matrix; the blocks beside the diagonal count twice."""
    matrix, out = rotated(KNOWN[name]), spans()[span]
    away = torch.eye(N, dtype=torch.float64) - out @ out.T
    exact = float((out.T @ matrix @ out).norm() ** 2 + 2 * (away @ matrix @ out).norm() ** 2)
    sampled = lengths(matrix, out, 12, distribution, "tie")
    run = Frobenius(probes=12, block=5, distribution=distribution, directions=out)(Dense(matrix), stream(1, "tie"))
    assert run.lengths == pytest.approx(sampled.tolist(), rel=1e-9, abs=1e-12)
    assert run.exact == pytest.approx(math.sqrt(exact), rel=1e-10)
    square = exact + float((sampled**2).mean())
    assert run.square[0] == pytest.approx(square, rel=1e-10)
    share = float((sampled**2).std() / (sampled**2).mean()) / math.sqrt(12)
    stretch = math.exp(float(student.ppf(0.975, 11)) * share)
    ends = [exact + float((sampled**2).mean()) * factor for factor in (1 / stretch, stretch)]
    assert run.square[1:] == pytest.approx(ends, rel=1e-8)
    assert run.standard_error == pytest.approx(share * float((sampled**2).mean()) / 2 / math.sqrt(square), rel=1e-7)
    assert run.products == 12 + out.shape[1]


@pytest.mark.parametrize("name", KNOWN)
def test_variance_and_bias_against_closed_form(name):
    """`2 ‖A²‖_F²` for Gaussian probes, less the diagonal of A² for signs (check 47)."""
    matrix = rotated(KNOWN[name])
    square = matrix @ matrix
    for distribution, less in ((Distribution.GAUSSIAN, 0.0), (Distribution.RADEMACHER, 1.0)):
        samples = lengths(matrix, spans()["none"], 5000, distribution, "variance") ** 2
        variance = 2 * float((square**2).sum() - less * (square.diagonal() ** 2).sum())
        assert float(samples.var()) == pytest.approx(variance, rel=0.1)
        assert abs(float(samples.mean() - square.trace())) <= 4 * math.sqrt(variance / 5000)


def hits(matrix: Tensor, probes: int, repeats: int) -> tuple[float, float]:
    """How often the interval, and Student's plain one for the square, hold the truth in many runs."""
    bits = torch.randint(0, 2, (N, probes * repeats), generator=stream(2, probes), dtype=torch.int8)
    samples = (matrix @ (bits.double() * 2 - 1)).square().sum(0).view(repeats, probes)
    half = float(student.ppf(0.975, probes - 1)) * samples.std(1) / math.sqrt(probes)
    mean, truth = samples.mean(1), float(matrix.norm() ** 2)
    around, plain = (mean / truth).log().abs() <= half / mean, (mean - truth).abs() <= half
    return float(around.double().mean()), float(plain.double().mean())


@pytest.mark.parametrize(("probes", "least"), [(10, 0.89), (64, 0.92)])
@pytest.mark.parametrize("values", [*KNOWN.values(), np.eye(N)[0]], ids=[*KNOWN, "rank one"])
def test_intervals_cover(values, probes, least):
    """Around the logarithm of the mean, even where one eigenvalue is all there is."""
    assert hits(rotated(values), probes, 1000)[0] >= least


def test_plain_intervals_would_cover_less():
    """Negative control: why the interval is laid around the logarithm."""
    around, plain = hits(rotated(np.eye(N)[0]), 10, 4000)
    assert plain < 0.88
    assert around > plain + 0.03


def test_few_eigenvalues_are_flagged_and_deflation_calms():
    matrix = rotated(KNOWN["outliers"])
    for probes in (10, 64):
        assert "dominate" in Frobenius(probes=probes)(Dense(matrix), stream(0)).doubt
    assert Frobenius(directions=spans()["eigenvectors"])(Dense(matrix), stream(0)).doubt == ""
    assert Frobenius(probes=20)(Dense(rotated(np.ones(300) + np.linspace(0, 1, 300))), stream(0)).doubt == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 50])
def test_degenerate_matrices(n, dtype):
    zero = Frobenius(probes=3)(Dense(torch.zeros(n, n, dtype=dtype)), stream(0))
    assert (zero.value, zero.lower, zero.upper, zero.standard_error, zero.doubt) == (0, 0, 0, 0, "")
    one = Frobenius(probes=3)(Dense(-2 * torch.eye(n, dtype=dtype)), stream(0))
    assert one.value == pytest.approx(2 * math.sqrt(n), rel=1e-6)
    assert one.lower <= 2 * math.sqrt(n) <= one.upper
    assert one.upper - one.lower < 1e-4 * one.value


def test_all_directions_leave_nothing_to_sample():
    matrix = rotated(KNOWN["indefinite"])
    run = Frobenius(probes=3, directions=eigenvectors(N))(Dense(matrix), stream(0))
    assert run.value == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert run.upper - run.lower <= 1e-12 * run.value
    assert run.doubt == ""


@settings(max_examples=25, deadline=None)
@given(st.floats(-150, 150), st.booleans(), st.sampled_from(sorted(KNOWN)), st.sampled_from(sorted(spans())))
def test_scale_equivariance(power, negative, name, span):
    """Even where squares over- or underflow."""
    factor = 10.0**power * (-1 if negative else 1)
    matrix = rotated(KNOWN[name])
    one, other = (Frobenius(probes=5, directions=spans()[span])(Dense(a), stream(2)) for a in (matrix, matrix * factor))
    for number in ("value", "lower", "upper", "standard_error"):
        assert getattr(other, number) / abs(factor) == pytest.approx(getattr(one, number), rel=1e-10)
    assert other.doubt == one.doubt


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(2, 20))
def test_block_changes_the_passes_not_the_probes(block, probes):
    matrix, out = rotated(KNOWN["decay"]), spans()["any"]
    one, other = (Frobenius(probes, block=b, directions=out)(Dense(matrix), stream(2)) for b in (1, block))
    assert one.lengths == pytest.approx(other.lengths, rel=1e-10)
    assert one.interval() == pytest.approx(other.interval(), rel=1e-10)


@pytest.mark.parametrize("bad", [{"probes": 1}, {"block": 0}, {"confidence": 1.5}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(UsageError):
        Frobenius(**bad)
