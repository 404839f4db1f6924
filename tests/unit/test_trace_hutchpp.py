"""Hutch++: what the sketch sees is exact, the rest is Hutchinson's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from cases.operators import rotated
from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.trace.hutchpp import HutchPlusPlus
from isoflat.linalg.vectors import Distribution

KNOWN = {
    "bulk": np.linspace(0, 1, 60),
    "indefinite": np.linspace(-1, 0.7, 60),
    "decay": 0.8 ** np.arange(60),
    "outliers": np.concatenate([[1e3, -3e2, 40], np.linspace(0, 1, 57)]),
}


@pytest.mark.parametrize("distribution", Distribution)
@pytest.mark.parametrize("name", KNOWN)
def test_equals_the_definition(name, distribution):
    """Sketch, orthonormalise, trace of the part inside, forms of the part outside; with LAPACK's QR."""
    matrix, random = rotated(KNOWN[name]).matrix, stream(1)
    sketch, probes = distribution.columns(60, 6, random), distribution.columns(60, 9, random)
    q, _ = torch.linalg.qr(matrix @ sketch)
    rest = probes - q @ (q.T @ probes)
    samples = (q * (matrix @ q)).sum() + (rest * (matrix @ rest)).sum(0)
    run = HutchPlusPlus(sketch=6, probes=9, block=4, distribution=distribution)(Dense(matrix), stream(1))
    assert run.value == pytest.approx(float(samples.mean()), rel=1e-10)
    assert run.samples == pytest.approx(samples.tolist(), rel=1e-10)
    half = float(student.ppf(0.975, 8) * samples.std()) / 3
    assert run.half_width == pytest.approx(half, rel=1e-8)
    assert run.products == 6 + 6 + 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_exact_up_to_the_size_of_the_sketch(rank, dtype):
    values = np.concatenate([(-2.0) ** np.arange(rank), np.zeros(100 - rank)])
    matrix = rotated(values, dtype=dtype).matrix
    run = HutchPlusPlus(sketch=8, probes=10)(Dense(matrix), stream(0))
    size = np.abs(values).sum()
    assert abs(run.value - values.sum()) <= (1e-9 if dtype == torch.float64 else 1e-4) * size
    lower, upper = run.interval()
    assert lower <= float(matrix.double().trace()) <= upper
    assert upper - lower <= (1e-9 if dtype == torch.float64 else 1e-3) * size
    assert run.doubt == ""


def test_better_than_hutchinson_where_the_spectrum_decays_and_not_where_it_is_flat():
    """With the same number of products."""
    for values, better in ((0.8 ** np.arange(100), True), (np.repeat([1.0, 0.0], 50), False)):
        operator = rotated(values)
        plain, sketched = (s(operator, stream(3)) for s in (Hutchinson(30), HutchPlusPlus(sketch=10, probes=10)))
        assert plain.products == sketched.products == 30
        assert (sketched.half_width < plain.half_width / 2) is better


@pytest.mark.parametrize("n", [1, 2, 3, 30, 60])
def test_exact_where_unit_vectors_cost_no_more(n):
    values = np.linspace(-1, 3, n)
    run = HutchPlusPlus(sketch=10, probes=40)(rotated(values), stream(0))
    assert run.value == pytest.approx(values.sum(), rel=1e-12, abs=1e-12)
    assert run.products == n
    assert run.standard_error == 0
    assert run.interval()[0] <= float(rotated(values).matrix.trace()) <= run.interval()[1]


def test_zero_matrix_needs_no_basis():
    run = HutchPlusPlus(sketch=4, probes=5)(Dense(torch.zeros(40, 40, dtype=torch.float64)), stream(0))
    assert (run.value, run.half_width, run.products, run.doubt) == (0, 0, 9, "")


def test_a_sketch_that_just_misses_the_outliers_is_flagged():
    """Ten dominant eigenvalues and a sketch of nine: what is left is one eigenvalue, and its forms are skewed."""
    values = np.concatenate([np.full(10, 100.0), np.linspace(0, 1, 190)])
    short, enough = (HutchPlusPlus(sketch=s, probes=30)(rotated(values), stream(0)) for s in (9, 14))
    assert "deflate" in short.doubt
    assert enough.doubt == ""


@settings(max_examples=25, deadline=None)
@given(st.floats(-30, 30), st.booleans(), st.sampled_from(sorted(KNOWN)))
def test_scale_equivariance(power, negative, name):
    factor = 10.0**power * (-1 if negative else 1)
    matrix = rotated(KNOWN[name]).matrix
    one, other = (HutchPlusPlus(5, 6)(Dense(a), stream(2)) for a in (matrix, matrix * factor))
    assert other.value / factor == pytest.approx(one.value, rel=1e-10)
    assert other.half_width / abs(factor) == pytest.approx(one.half_width, rel=1e-8)
    assert other.concentration == pytest.approx(one.concentration, rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 12), st.integers(2, 20))
def test_block_changes_the_passes_not_the_vectors(block, sketch, probes):
    matrix = rotated(KNOWN["indefinite"]).matrix
    one, other = (HutchPlusPlus(sketch, probes, block=b)(Dense(matrix), stream(2)) for b in (1, block))
    assert one.samples == pytest.approx(other.samples, rel=1e-10, abs=1e-10)
    assert one.products == other.products


@pytest.mark.parametrize("bad", [{"sketch": 0}, {"probes": 1}, {"block": 0}, {"confidence": math.nan}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(UsageError):
        HutchPlusPlus(**bad)
