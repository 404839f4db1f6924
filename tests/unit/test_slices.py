"""Shifts of least norm: the element at which the weighted squares stand still."""

import numpy as np
import pytest
from scipy import sparse

from isoflat.symmetry.canonical.shift_gauge import _least


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_weighted_squares_are_least_where_their_derivative_vanishes(scale):
    """Units that share a coordinate, weighted unequally; one by itself; and one that nothing moves."""
    rows = sparse.csr_matrix([[1.0, 0, 0], [2.0, -1.0, 0], [0, 3.0, 0], [0, 0, -4.0], [0, 0, 0]])
    values, weights = scale * np.array([1.0, -2.0, 0.5, 3.0, 7.0]), np.array([1.0, 9.0, 4.0, 2.0, 1.0])
    element = _least(rows, values, weights)
    left = values + rows @ element
    assert np.abs(rows.T @ (weights * left)).max() <= 1e-13 * scale
    assert np.abs(left[:3]).max() > 0.01 * scale, "the case is not exercised: the shared units can all be emptied"
    assert left[3:] == pytest.approx([0.0, 7.0 * scale], abs=1e-15 * scale)
