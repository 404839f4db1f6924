"""The diagonal and traces of its blocks: variance, bias, coverage, also of all blocks at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.linalg.operator import Dense
from isoflat.linalg.trace.diagonal import DiagonalEstimator
from isoflat.linalg.trace.hutchinson import Hutchinson
from isoflat.linalg.vectors import rademacher

N, SIZES = 40, (5, 1, 20, 14)


def dense(seed: int = 0) -> Tensor:
    """An indefinite matrix without structure."""
    drawn = torch.randn(N, N, generator=stream(seed, "dense"), dtype=torch.float64)
    return (drawn + drawn.T) / 2


def test_equals_the_definition():
    """Entries, their standard errors, and blocks, from the same products."""
    matrix = dense()
    v = rademacher(N, 20, stream(1))
    entries = v * (matrix @ v)
    run = DiagonalEstimator(probes=20, sizes=SIZES, block=6)(Dense(matrix), stream(1))
    assert torch.allclose(run.diagonal, entries.mean(1), rtol=1e-11, atol=1e-12)
    assert torch.allclose(run.standard_errors, entries.std(1) / math.sqrt(20), rtol=1e-10)
    for part, block in zip(entries.split(SIZES), run.blocks, strict=True):
        assert block.samples == pytest.approx(part.sum(0).tolist(), rel=1e-10, abs=1e-12)
        assert block.value == pytest.approx(float(part.sum() / 20), rel=1e-10)
        assert block.standard_error == pytest.approx(float(part.sum(0).std()) / math.sqrt(20), rel=1e-10)
    assert run.products == 20


def test_blocks_add_up_to_the_trace():
    """Check 36, for the samples of the same probes one by one."""
    matrix = Dense(dense())
    blocks = DiagonalEstimator(probes=10, sizes=SIZES)(matrix, stream(2)).blocks
    whole = Hutchinson(probes=10)(matrix, stream(2))
    sums = [math.fsum(parts) for parts in zip(*(block.samples for block in blocks), strict=True)]
    assert sums == pytest.approx(whole.samples, rel=1e-12)
    single = DiagonalEstimator(probes=10, sizes=(N,))(matrix, stream(2)).blocks[0]
    assert (single.value, single.half_width) == (whole.value, whole.half_width)


def test_variance_and_bias_against_closed_form():
    """`Σ_{j≠i} a_ij²` for entry i."""
    matrix = dense()
    run = DiagonalEstimator(probes=3000)(Dense(matrix), stream(3))
    variance = (matrix**2).sum(1) - matrix.diagonal() ** 2
    assert torch.allclose(run.standard_errors**2 * 3000, variance, rtol=0.15)
    assert float(((run.diagonal - matrix.diagonal()) / run.standard_errors).abs().max()) < 4


def test_intervals_of_blocks_cover():
    """Each at 95 %; all at once only if asked for, at the price of wider ones."""
    matrix, probes, repeats = dense(), 12, 4000
    bits = torch.randint(0, 2, (N, probes * repeats), generator=stream(4), dtype=torch.int8)
    entries = ((bits.double() * 2 - 1) * (matrix @ (bits.double() * 2 - 1))).view(N, repeats, probes)
    samples = torch.stack([part.sum(0) for part in entries.split(SIZES)])
    truth = torch.stack([part.sum() for part in matrix.diagonal().split(SIZES)])
    ratio = (samples.mean(2) - truth[:, None]).abs() / (samples.std(2) / math.sqrt(probes))
    for simultaneous, failure in ((False, 0.05), (True, 0.05 / len(SIZES))):
        reach = float(student.isf(failure / 2, probes - 1))
        for block in DiagonalEstimator(probes, SIZES, simultaneous)(Dense(matrix), stream(0)).blocks:
            assert block.half_width == pytest.approx(reach * block.standard_error, rel=1e-8)
        held = (ratio <= reach).double()
        assert float((held.mean(1) - (1 - failure)).abs().max()) < 0.015
        assert (float(held.prod(0).mean()) >= 0.945) is simultaneous


def test_a_block_dominated_by_one_direction_is_flagged():
    matrix = dense() * 1e-3
    matrix[:5, :5] += 10 * torch.ones(5, 5, dtype=torch.float64)
    matrix[6:26, 6:26] += torch.outer(torch.ones(20), torch.ones(20)).double()
    blocks = DiagonalEstimator(probes=20, sizes=SIZES)(Dense(matrix), stream(0)).blocks
    assert [bool(block.doubt) for block in blocks][2] is True
    calm = DiagonalEstimator(probes=20, sizes=SIZES)(Dense(dense()), stream(0)).blocks
    assert [bool(block.doubt) for block in calm][2] is False


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=20), st.integers(2, 9))
def test_exact_for_diagonal_matrices(entries, probes):
    matrix = torch.diag(torch.tensor(entries, dtype=torch.float64))
    run = DiagonalEstimator(probes=probes, sizes=(len(entries),))(Dense(matrix), stream(0))
    assert run.diagonal.tolist() == entries
    assert float(run.standard_errors.abs().max()) == 0
    assert run.blocks[0].value == sum(entries)
    assert run.blocks[0].doubt == ""


@settings(max_examples=25, deadline=None)
@given(st.floats(-30, 30), st.booleans())
def test_scale_equivariance(power, negative):
    factor = 10.0**power * (-1 if negative else 1)
    one, other = (DiagonalEstimator(probes=5, sizes=SIZES)(Dense(a), stream(2)) for a in (dense(), dense() * factor))
    assert torch.allclose(other.diagonal / factor, one.diagonal, rtol=1e-10, atol=1e-12)
    assert torch.allclose(other.standard_errors / abs(factor), one.standard_errors, rtol=1e-10)
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert b.half_width / abs(factor) == pytest.approx(a.half_width, rel=1e-10)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(2, 20))
def test_block_changes_the_passes_not_the_probes(block, probes):
    one, other = (DiagonalEstimator(probes, SIZES, block=b)(Dense(dense()), stream(2)) for b in (1, block))
    assert torch.allclose(one.diagonal, other.diagonal, rtol=1e-11, atol=1e-12)
    assert torch.allclose(one.standard_errors, other.standard_errors, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2])
def test_small_and_zero_matrices(n):
    run = DiagonalEstimator(probes=2, sizes=(n,))(Dense(torch.zeros(n, n)), stream(0))
    assert run.diagonal.tolist() == [0.0] * n
    assert (run.blocks[0].value, run.blocks[0].half_width, run.blocks[0].doubt) == (0, 0, "")


def test_empty_blocks_and_no_blocks():
    run = DiagonalEstimator(probes=3, sizes=(0, N, 0))(Dense(dense()), stream(0))
    assert [block.value for block in run.blocks][::2] == [0, 0]
    assert DiagonalEstimator(probes=3)(Dense(dense()), stream(0)).blocks == ()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="40"):
        DiagonalEstimator(sizes=(3, 4))(Dense(dense()), stream(0))


@pytest.mark.parametrize("bad", [{"probes": 1}, {"block": 0}, {"confidence": 0.0}, {"sizes": (3, -1)}])
def test_settings_without_meaning_are_refused(bad):
    with pytest.raises(UsageError):
        DiagonalEstimator(**bad)
