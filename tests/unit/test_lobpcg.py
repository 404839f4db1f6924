"""LOBPCG on its own: against SciPy's, without a basis that grows, and stable where the plain method breaks down."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, lobpcg

from cases.operators import Spectrum, spectrum
from isoflat.core import space
from isoflat.core.rng import stream
from isoflat.linalg.eigen.block_lanczos import Eigenpairs
from isoflat.linalg.eigen.lobpcg import Lobpcg, _conjugate
from isoflat.linalg.probes import spherical
from isoflat.linalg.solver import Domain

OUTLIERS = np.concatenate([np.linspace(-0.5, 0.5, 400), np.arange(1.0, 9.0), -np.arange(1.0, 5.0)])


def advanced(operator: Spectrum, task: Lobpcg, steps: int):
    """A search by itself after some steps towards residuals that cannot be reached."""
    search = task.search(Domain.of(operator), stream(0))
    for _ in range(steps):
        if search.stuck:
            break
        goals = dict.fromkeys(range(len(search.ritz()[0])), 1e-300)
        running = search.advance(goals, 1000)
        reply = operator.matmat(next(running).vectors)
        with pytest.raises(StopIteration):
            running.send(reply)
    return search


@pytest.mark.parametrize("side", ["largest", "smallest"])
def test_against_scipy(side):
    """The same eigenvalues, from no more products than SciPy's takes to the same residuals, certificate aside."""
    values, taken = OUTLIERS if side == "largest" else -OUTLIERS, 0

    def multiply(x: np.ndarray) -> np.ndarray:
        nonlocal taken
        taken += x.shape[1]
        return values[:, None] * x

    n = len(values)
    start = spherical(n, 4, stream(3))
    matrix = LinearOperator((n, n), matvec=lambda x: multiply(x.reshape(n, 1)), matmat=multiply, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, _ = lobpcg(matrix, start.numpy(), largest=side == "largest", tol=1e-3, maxiter=100)
    counts = {"largest": 4} if side == "largest" else {"largest": 0, "smallest": 4}
    ours = Lobpcg(**counts, start=start, rtol=1e-6)(spectrum(values), stream(0))
    assert ours.reached
    pairs = getattr(ours, side)
    assert [pair.value for pair in pairs] == pytest.approx(theirs, rel=1e-6)
    for pair, value in zip(pairs, theirs, strict=True):
        assert pair.lower - 1e-5 <= value <= pair.upper + 1e-5
    plain = Lobpcg(**counts, start=start, certify=False, rtol=1e-3 / 8)(spectrum(values), stream(0))
    assert plain.reached
    assert plain.products <= taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ends_at_once_as_block_lanczos(dtype):
    operator = spectrum(OUTLIERS, dtype)
    one, other = (solver(4, 3, rtol=1e-5)(operator, stream(1)) for solver in (Lobpcg, Eigenpairs))
    assert one.reached
    for ours, theirs in zip(one.largest + one.smallest, other.largest + other.smallest, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)
        assert max(ours.lower, theirs.lower) <= min(ours.upper, theirs.upper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_three_blocks_however_long_it_runs(dtype):
    operator = spectrum(np.linspace(0, 1, 300), dtype)
    task = Lobpcg(3, 2, guard=1)
    for steps in (2, 25):
        search = advanced(operator, task, steps)
        held = [*search._vectors, *search._conjugate, *search._images, *search._moved]
        assert len(search._vectors) == 7
        assert len(held) <= 2 * 2 * 7, "the residuals make the third block, for the time of a step"
        assert {vector.dtype for vector in held} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["outliers", "cluster", "bulk"])
def test_basis_stays_orthonormal_and_images_true(name, dtype):
    """Long after convergence, where residuals are rounding and the plain method's Gram matrix is singular."""
    values = {
        "outliers": OUTLIERS,
        "cluster": np.concatenate([np.linspace(-1, 1, 100), 5 + 1e-9 * np.arange(5)]),
        "bulk": np.linspace(0, 1, 120),
    }[name]
    operator, eps = spectrum(values, dtype), torch.finfo(dtype).eps
    search = advanced(operator, Lobpcg(4, guard=1), 25)
    rows = torch.stack([*search._vectors, *search._conjugate]).double()
    identity = torch.eye(len(rows), dtype=torch.float64)
    assert float(torch.linalg.matrix_norm(rows @ rows.T - identity, 2)) < 30 * eps
    images = torch.stack([*search._images, *search._moved]).double() * search.scale
    defect = images - operator.double().matmat(rows.T).T
    assert float(torch.linalg.matrix_norm(defect, 2)) < 30 * search.steps * eps * np.abs(values).max()
    assert search.ritz()[0].max() <= values.max() * (1 + 100 * eps)
    if name != "bulk":
        assert search.ritz()[0][-4:] == pytest.approx(np.sort(values)[-4:], rel=1000 * eps)


def test_plain_basis_becomes_singular():
    """Negative control: vectors, residuals and differences of iterates as they are, near convergence."""
    operator = spectrum(OUTLIERS)
    search = advanced(operator, Lobpcg(4), 25)
    vectors = torch.stack(search._vectors)
    residuals = torch.stack([search._residual(j) for j in range(len(vectors))])
    plain = torch.cat([vectors, residuals])
    assert float(torch.linalg.cond(plain @ plain.T)) > 1e12


def test_each_step_is_no_worse_than_the_last():
    """Rayleigh and Ritz on a space that holds the old vectors: values at the top only rise, at the bottom only fall."""
    operator = spectrum(np.linspace(-1, 1, 150) ** 3)
    before = None
    for steps in range(1, 10):
        values = advanced(operator, Lobpcg(2, 2, guard=0), steps).ritz()[0]
        if before is not None:
            assert np.all(values[2:] >= before[2:] - 1e-14)
            assert np.all(values[:2] <= before[:2] + 1e-14)
        before = values


def test_directions_of_the_last_step_are_worth_their_memory():
    """Negative control: steepest descent, without them, is far behind after as many products."""
    operator = spectrum(np.linspace(0, 1, 400))
    with_them = advanced(operator, Lobpcg(2, guard=0), 30)
    without = Lobpcg(2, guard=0).search(Domain.of(operator), stream(0))
    for _ in range(30):
        running = without.advance(dict.fromkeys(range(len(without.ritz()[0])), 1e-300), 1000)
        reply = operator.matmat(next(running).vectors)
        with pytest.raises(StopIteration):
            running.send(reply)
        without._conjugate, without._moved = [], []
    assert 1 - with_them.ritz()[0][-1] < 0.3 * (1 - without.ritz()[0][-1])


def test_conjugate_directions():
    """Orthonormal, orthogonal to the new vectors, and with them spanning the way from the old ones."""
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 9)))[0]
    ahead = turn[:, :3]
    across = _conjugate(ahead, 3, 3)
    both = np.hstack([ahead, across])
    assert np.allclose(both.T @ both, np.eye(6), atol=1e-14)
    moved = ahead.copy()
    moved[:3] = 0
    assert np.allclose(both @ (both.T @ moved), moved, atol=1e-14)
    assert _conjugate(ahead, 3, 1).shape == (9, 1)
    assert _conjugate(np.eye(9)[:, :3], 3, 3).shape == (9, 0), "nothing moved"
    assert _conjugate(ahead, 0, 3).shape == (9, 0), "there were no old ones"


def test_fewer_dimensions_than_blocks():
    for n in (1, 2, 3, 5, 8):
        values = np.arange(n) - 1.5
        run = Lobpcg(3, 2, rtol=1e-9)(spectrum(values), stream(0))
        assert run.reached
        assert [pair.value for pair in run.largest] == pytest.approx(values[::-1][:3], abs=1e-12)
        assert [pair.value for pair in run.smallest] == pytest.approx(values[:2], abs=1e-12)


def test_guards_help_where_the_next_eigenvalue_is_close():
    values = np.concatenate([np.linspace(0, 1, 300), [3.0, 2.99, 2.98, 2.9]])
    few, some = (Lobpcg(3, guard=guard, rtol=1e-6)(spectrum(values), stream(0)) for guard in (0, 3))
    assert few.reached
    assert some.reached
    assert some.products < few.products


def test_vectors_are_the_callers():
    """What is returned is in float64 and of length 1, whatever was stored."""
    run = Lobpcg(2)(spectrum(OUTLIERS, torch.float32), stream(0))
    for pair in run.largest:
        assert pair.vector.dtype == torch.float64
        assert space.norm(pair.vector) == pytest.approx(1, rel=1e-14)
