"""Sums over many entries: accuracy, range and bookkeeping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isoflat.core import space
from isoflat.core.rng import stream
from isoflat.core.space import CHUNK, ParameterSpace

MANY = 3 * CHUNK + 17
"""More than fits in one piece, and no multiple of it."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=stream(0, "space", shape), dtype=dtype)


def test_inner_and_combine_against_numpy_in_float64():
    rows, vector = draw(3, MANY), draw(MANY)
    wide = rows.double().numpy()
    size = np.linalg.norm(wide, axis=1) * np.linalg.norm(vector.double().numpy())
    error = abs(space.inner(rows, vector).numpy() - wide @ vector.double().numpy())
    assert (error <= 1e-14 * size).all()
    coefficients = torch.tensor([1.0, -1e8, 1e8], dtype=torch.float64)
    exact = coefficients.numpy() @ wide
    out = space.combine(coefficients, rows)
    assert out.dtype == torch.float64
    assert np.abs(out.numpy() - exact).max() <= 1e-15 * 1e8 * np.abs(wide).max() * 4


def test_float32_accumulation_would_be_seen():
    """Negative control for the test above."""
    rows, vector = draw(3, MANY), draw(MANY)
    exact = rows.double() @ vector.double()
    size = rows.double().norm(dim=1) * vector.double().norm()
    assert float(((rows @ vector).double() - exact).abs().max() / size.max()) > 1e-11


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_pieces_cover_every_column_once(rows):
    """Ones add up to the number of columns, whatever the number of rows does to the width of a piece."""
    n = (1 << 14) * 3 + 5
    ones = torch.ones(rows, n)
    assert space.inner(ones, ones[0]).tolist() == [n] * rows
    assert (space.combine(torch.ones(rows, dtype=torch.float64), ones) == rows).all()


def test_norm_of_a_million_float32_entries():
    vector = draw(1_000_000) * 1e-3 + 1
    exact = math.sqrt(math.fsum((vector.double() ** 2).tolist()))
    assert space.norm(vector) == pytest.approx(exact, rel=1e-12)
    assert abs(float(torch.linalg.vector_norm(vector)) / exact - 1) > 1e-12


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_norm_where_the_squares_leave_the_range(scale):
    vector = draw(1000, dtype=torch.float64)
    exact = float(np.linalg.norm(vector.numpy()))
    assert space.norm(vector * scale) == pytest.approx(exact * scale, rel=1e-14)


def test_plain_sum_of_squares_would_leave_the_range():
    """Negative control for the test above."""
    vector = draw(1000, dtype=torch.float64)
    assert float(((vector * 1e-300) ** 2).sum()) == 0
    assert float(((vector * 1e300) ** 2).sum()) == math.inf


@given(st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=30), st.integers(-900, 900))
def test_norm_is_equivariant_to_powers_of_two_to_the_bit(values, power):
    vector = torch.tensor(values, dtype=torch.float64)
    vector = torch.where(vector.abs() < 1e-30, 0.0, vector)
    assert space.norm(vector * 2.0**power) == space.norm(vector) * 2.0**power


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, max_value=1e306, min_value=-1e306), max_size=20))
def test_norm_against_hypot(values):
    assert space.norm(torch.tensor(values, dtype=torch.float64)) == pytest.approx(
        math.hypot(*values), rel=1e-14, abs=5e-324
    )


def test_norm_of_what_is_not_finite():
    assert math.isnan(space.norm(torch.tensor([1.0, math.nan])))
    assert space.norm(torch.tensor([1.0, -math.inf])) == math.inf
    assert space.norm(torch.empty(0)) == 0


@given(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5))
def test_flatten_and_unflatten_are_inverse(shapes):
    names = tuple(f"t{i}" for i in range(len(shapes)))
    layout = ParameterSpace(names, tuple(shapes))
    vector = torch.arange(layout.size, dtype=torch.float32)
    tensors = layout.unflatten(vector)
    assert [tuple(tensors[name].shape) for name in names] == shapes
    assert torch.equal(layout.flatten(tensors), vector)
    assert torch.equal(layout.flatten(list(tensors.values())), vector)
    assert all(torch.equal(vector[layout.slices[name]], tensors[name].reshape(-1)) for name in names)


def test_flatten_takes_tensors_by_name_not_by_order():
    layout = ParameterSpace(("a", "b"), ((2,), (1,)))
    assert layout.flatten({"b": torch.tensor([3.0]), "a": torch.tensor([1.0, 2.0])}).tolist() == [1, 2, 3]


def test_unflatten_gives_views():
    layout = ParameterSpace(("a", "b"), ((2, 2), (3,)))
    vector = torch.zeros(7)
    layout.unflatten(vector)["b"][1] = 5
    assert vector[5] == 5


def test_block_norms_and_spread():
    layout = ParameterSpace(("a", "empty", "b"), ((2, 2), (0,), (3,)))
    vector = draw(7)
    parts = [vector[:4], vector[4:]]
    norms = layout.block_norms(vector)
    assert norms.dtype == torch.float64
    assert norms.tolist() == [space.norm(parts[0]), 0, space.norm(parts[1])]
    assert layout.spread(norms).tolist() == [float(norms[0])] * 4 + [float(norms[2])] * 3
