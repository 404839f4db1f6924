"""The potential: derivatives against autograd, balance at the minimum, and the closure of orbits."""

import itertools

import numpy as np
import pytest
import torch
from scipy import sparse

from isoflat.core.errors import NoInvariantGeometry
from isoflat.core.rng import stream
from isoflat.symmetry.canonical.potential import Mass, _Potential, close, dead, minimise


def _chain(widths, seed=0, zeros=()):
    """Masses of a chain of matrices between hidden units, one coordinate per unit; the ends are fixed."""
    random = stream(seed, "potential")
    starts = np.cumsum([0, *widths[1:-1]])
    size = int(starts[-1])

    def forms(layer):
        n = widths[layer]
        if layer in (0, len(widths) - 1):
            return sparse.csr_matrix((n, size))
        at = starts[layer - 1]
        return sparse.csr_matrix((np.ones(n), (range(n), range(at, at + n))), shape=(n, size))

    masses = []
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        squares = torch.rand(1, b, a, generator=random, dtype=torch.float64)
        masses.append(Mass(f"w{layer}", squares, forms(layer + 1), forms(layer), -1))
    return masses, sparse.csr_matrix((0, size)), size


def _value(masses, factors, z):
    total = -2 * float(factors.toarray().sum(0) @ z) if factors.shape[0] else 0.0
    for mass in masses:
        a = torch.from_numpy(mass.first.toarray() @ z)[:, None]
        b = torch.from_numpy(mass.second.toarray() @ z)[None, :] * mass.sign
        total = total + float((mass.squares[0] * (2 * (a + b)).exp()).sum())
    return total


def test_derivatives_agree_with_differences():
    masses, factors, size = _chain((3, 4, 5, 2))
    factors = sparse.csr_matrix(np.eye(1, size))
    potential = _Potential(masses, factors, size)
    rng = np.random.default_rng(0)
    z, d, h = rng.normal(size=size) * 0.3, rng.normal(size=size), 1e-5
    point = potential.at(z)
    slope = (_value(masses, factors, z + h * d) - _value(masses, factors, z - h * d)) / (2 * h)
    assert float(point.gradient @ d) == pytest.approx(slope, rel=1e-8)
    turn = (potential.at(z + h * d).gradient - potential.at(z - h * d).gradient) / (2 * h)
    assert point.product(d) == pytest.approx(turn, rel=1e-6)


@pytest.mark.parametrize("widths", [(3, 4, 2), (2, 5, 5, 5, 3), (4, *[6] * 30, 2)])
def test_units_are_balanced_at_the_minimum(widths):
    """In-norm² equals out-norm² for every unit (the gradient vanishes), from a start that is far away."""
    masses, factors, size = _chain(widths)
    far = [Mass(m.name, m.squares * 10.0 ** (3 * (-1) ** k), m.first, m.second, m.sign) for k, m in enumerate(masses)]
    z = minimise(far, factors, size)
    scaled = []
    for mass in far:
        a, b = torch.from_numpy(mass.first @ z), torch.from_numpy(mass.second @ z)
        scaled.append(mass.squares[0] * (2 * (a[:, None] - b[None, :])).exp())
    for before, after in itertools.pairwise(scaled):
        assert torch.allclose(before.sum(1), after.sum(0), rtol=1e-12)


def test_a_factor_is_worth_its_writers():
    """`Σ‖T‖² − 2 log u` for one writer of scale u: its norm is 1 at the minimum."""
    mass = Mass("w", torch.full((1, 3, 2), 7.0, dtype=torch.float64), sparse.csr_matrix(np.ones((3, 1))),
                sparse.csr_matrix((1, 1)), -1)  # fmt: skip
    z = minimise([mass], sparse.csr_matrix([[1.0]]), 1)
    assert float(42 * np.exp(2 * z[0])) == pytest.approx(1.0, rel=1e-13)


def test_units_of_degree_k():
    """A unit whose reader scales with its square: in² = 2 out²."""
    one, two = sparse.csr_matrix([[1.0]]), sparse.csr_matrix([[2.0]])
    none = sparse.csr_matrix((1, 1))
    masses = [Mass("in", torch.full((1, 1, 1), 5.0, dtype=torch.float64), one, none, -1),
              Mass("out", torch.full((1, 1, 1), 3.0, dtype=torch.float64), none, two, -1)]  # fmt: skip
    z = float(minimise(masses, sparse.csr_matrix((0, 1)), 1)[0])
    assert 5 * np.exp(2 * z) == pytest.approx(2 * 3 * np.exp(-4 * z), rel=1e-12)


def test_closure_zeroes_chains_and_keeps_what_is_fed():
    """Nothing reads unit 1 of the last hidden layer, which alone reads unit 0 of the first."""
    masses, factors, size = _chain((3, 2, 3, 2))
    masses[2].squares[0, :, 1] = 0
    masses[1].squares[0, [0, 2], 0] = 0
    closed, kept = close(masses, factors, size)
    assert kept.all()
    assert not closed[0].squares[0, 0].any()  # row of unit 0
    assert not closed[1].squares[0, 1].any()  # row of unit 1 of the next layer
    assert closed[0].squares[0, 1].all()
    assert dead(closed, size).tolist() == [True, False, False, True, False]
    assert np.isfinite(minimise(closed, factors, size)).all()


def test_a_last_writer_is_never_zeroed():
    """A stream that a normalisation reads keeps its writer though nothing else does; without any, it is dropped."""
    stream_, none = sparse.csr_matrix(np.ones((2, 1))), sparse.csr_matrix((1, 1))
    for squares, stays in ((torch.ones(1, 2, 3, dtype=torch.float64), True), (torch.zeros(1, 2, 3).double(), False)):
        closed, kept = close([Mass("w", squares, stream_, none, -1)], sparse.csr_matrix([[1.0]]), 1)
        assert kept.tolist() == [stays]
        assert torch.equal(closed[0].squares, squares)


def test_an_open_orbit_is_refused():
    """Negative control: without the closure a dead unit has no minimum, and Newton says so."""
    masses, factors, size = _chain((2, 2, 2))
    masses[1].squares[0, :, 0] = 0
    with pytest.raises(NoInvariantGeometry, match="closed"):
        minimise(masses, factors, size)
