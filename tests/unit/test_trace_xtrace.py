"""XTrace: the updating formulas against leaving vectors out one by one, exactness, and the interval's ingredients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from cases.operators import rotated
from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense
from isoflat.linalg.trace.xtrace import XTrace
from isoflat.linalg.vectors import Distribution

KNOWN = {
    "bulk": np.linspace(0, 1, 60),
    "indefinite": np.linspace(-1, 0.7, 60),
    "decay": 0.8 ** np.arange(60),
    "outliers": np.concatenate([[1e3, -3e2, 40], np.linspace(0, 1, 57)]),
    "power law": np.arange(1, 61) ** -2.0,
}


def left_out(matrix: Tensor, omega: Tensor, i: int, others: list[int]) -> float:
    """One value as it is defined: sketch with the others, normalised form with vector i."""
    n = len(matrix)
    q, _ = torch.linalg.qr(matrix @ omega[:, others])
    rest = omega[:, i] - q @ (q.T @ omega[:, i])
    rest *= math.sqrt((n - len(others)) / float(rest @ rest))
    return float((q * (matrix @ q)).sum() + rest @ matrix @ rest)


def naive(matrix: Tensor, omega: Tensor) -> tuple[list[float], list[float]]:
    """All values, and the means without one more vector each."""
    k = omega.shape[1]
    values = [left_out(matrix, omega, i, [j for j in range(k) if j != i]) for i in range(k)]
    without = []
    for gone in range(k):
        kept = [i for i in range(k) if i != gone]
        without.append(math.fsum(left_out(matrix, omega, i, [j for j in kept if j != i]) for i in kept) / (k - 1))
    return values, without


@pytest.mark.parametrize("k", [2, 3, 8, 20])
@pytest.mark.parametrize("name", KNOWN)
def test_equals_leaving_out_one_by_one(name, k):
    """Values, value and standard error, jackknife included, to 1e-10 of the size of the matrix (check 46)."""
    matrix = rotated(KNOWN[name]).matrix
    run = XTrace(vectors=k, confidence=0.9)(Dense(matrix), stream(1))
    values, without = naive(matrix, Distribution.SPHERE.columns(60, k, stream(1)))
    size = float(np.abs(KNOWN[name]).sum())
    assert run.samples == pytest.approx(values, rel=1e-10, abs=1e-10 * size)
    assert run.value == pytest.approx(math.fsum(values) / k, rel=1e-10, abs=1e-10 * size)
    jackknife = float(np.var(without)) * k
    error = (float(np.var(values, ddof=1)) / k * jackknife) ** 0.25
    assert run.standard_error == pytest.approx(error, rel=1e-6, abs=1e-10 * size)
    quantile = float(student.ppf(0.95, k - 1))
    assert run.half_width == pytest.approx(quantile * run.standard_error + run.rounding, rel=1e-12)
    assert run.products == 2 * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_exact_beyond_the_rank(rank, dtype):
    """To 1e-9 with as few vectors as rank + 1, and the interval holds what rounding left (check 46)."""
    values = np.concatenate([(-2.0) ** np.arange(rank), np.zeros(100 - rank)])
    for vectors in (rank + 1, rank + 2, 2 * rank + 3):
        matrix = rotated(values, dtype=dtype).matrix
        run = XTrace(vectors=vectors)(Dense(matrix), stream(0, vectors))
        size = np.abs(values).sum()
        assert abs(run.value - values.sum()) <= (1e-9 if dtype == torch.float64 else 1e-4) * size
        lower, upper = run.interval()
        assert lower <= float(matrix.double().trace()) <= upper
        assert upper - lower <= (1e-6 if dtype == torch.float64 else 1e-2) * size


def test_not_exact_at_the_rank():
    """Negative control: with as many vectors as the rank one direction is missing each time."""
    run = XTrace(vectors=5)(rotated(np.concatenate([np.ones(5), np.zeros(95)])), stream(0))
    assert abs(run.value - 5) > 1e-3


@pytest.mark.parametrize("vectors", [30, 59, 60, 200])
@pytest.mark.parametrize("name", KNOWN)
def test_exact_where_unit_vectors_cost_no_more(name, vectors):
    """Twice as many products as vectors reach the dimension (check 46)."""
    run = XTrace(vectors=vectors, block=7)(rotated(KNOWN[name]), stream(0))
    assert run.value == pytest.approx(KNOWN[name].sum(), rel=1e-9, abs=1e-9)
    assert run.products == 60
    assert run.standard_error == 0
    lower, upper = run.interval()
    assert lower <= float(rotated(KNOWN[name]).matrix.trace()) <= upper


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_zero_and_small_matrices(n):
    zero = XTrace(vectors=5)(Dense(torch.zeros(n, n, dtype=torch.float64)), stream(0))
    assert (zero.value, zero.half_width) == (0, 0)
    one = XTrace(vectors=2)(Dense(torch.eye(n, dtype=torch.float64) * -3), stream(0))
    assert one.value == pytest.approx(-3 * n, rel=1e-12)


def test_columns_without_entries_are_dropped():
    """Products that are dependent to the bit: the basis is smaller than the number of vectors."""
    matrix = torch.zeros(40, 40, dtype=torch.float64)
    matrix[3, 3], matrix[7, 7] = 2.0, -5.0
    run = XTrace(vectors=6)(Dense(matrix), stream(0))
    assert run.value == pytest.approx(-3, rel=1e-12)
    assert run.products == 6 + 2


def test_beats_hutchinson_on_decaying_spectra():
    """What it is for: with 24 products the error is far below that of 24 forms."""
    matrix = rotated(0.6 ** np.arange(60)).matrix
    run = XTrace(vectors=12)(Dense(matrix), stream(0))
    assert abs(run.value - 2.5) < 1e-2
    assert run.half_width < 0.05


@settings(max_examples=25, deadline=None)
@given(st.floats(-30, 30), st.booleans(), st.sampled_from(sorted(KNOWN)))
def test_scale_equivariance(power, negative, name):
    factor = 10.0**power * (-1 if negative else 1)
    matrix = rotated(KNOWN[name]).matrix
    one, other = (XTrace(vectors=6)(Dense(a), stream(2)) for a in (matrix, matrix * factor))
    size = np.abs(KNOWN[name]).sum()
    assert other.value / factor == pytest.approx(one.value, rel=1e-10, abs=1e-12 * size)
    assert other.half_width / abs(factor) == pytest.approx(one.half_width, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(2, 20))
def test_block_changes_the_passes_not_the_vectors(block, vectors):
    matrix = rotated(KNOWN["bulk"]).matrix
    one, other = (XTrace(vectors=vectors, block=b)(Dense(matrix), stream(2)) for b in (1, block))
    assert one.samples == pytest.approx(other.samples, rel=1e-10)
    assert one.half_width == pytest.approx(other.half_width, rel=1e-6)


@pytest.mark.parametrize("bad", [{"vectors": 1}, {"block": 0}, {"confidence": 0.0}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(UsageError):
        XTrace(**bad)
