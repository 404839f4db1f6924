"""The block recurrence: backward stable like the plain one, whatever is multiplied and in whatever order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases.operators import rotated
from isoflat.core import space
from isoflat.core.rng import stream
from isoflat.linalg.krylov.block import BlockRecurrence
from isoflat.linalg.krylov.recurrence import Recurrence
from isoflat.linalg.operator import Dense
from isoflat.linalg.vectors import orthogonalise, orthonormalise, restart, sphere, spherical

bulk = np.linspace(-1, 1, 60)
KNOWN = {
    "outliers 1e0 to 1e6": np.concatenate([bulk, 10.0 ** np.arange(1, 7)]),
    "cluster of gap 1e-08": np.concatenate([bulk, 5 + 1e-8 * np.arange(4)]),
    "multiplicity 10": np.concatenate([bulk, np.full(10, 3.0)]),
    "tie of multiple ends": np.concatenate([bulk, np.full(4, 7.0), np.full(3, -7.0)]),
    "rank one": np.concatenate([[4.0], np.zeros(70)]),
    "identity": np.ones(50),
    "n = 1": np.array([-2.5]),
    "n = 2": np.array([-2.5, 1.0]),
    "power law": np.arange(1, 90) ** -1.5,
}


def grown(operator: Dense, width: int, steps: int, choosy: bool = False, seed: int = 2) -> BlockRecurrence:
    """A recurrence after some steps; a choosy one multiplies residuals of the two outermost pairs only."""
    recurrence = BlockRecurrence(spherical(operator.n, min(width, operator.n), stream(seed)), operator.dtype)
    for _ in range(steps):
        if recurrence.exhausted:
            break
        if choosy and recurrence.k > 1:
            residuals = recurrence.residuals(recurrence.ritz()[1][:, [0, -1]])
            recurrence.steer(np.linalg.qr(residuals)[0][:, : min(2, recurrence.waiting)])
        recurrence.extend(operator.matmat(recurrence.block))
    return recurrence


def pieces(recurrence: BlockRecurrence) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V, T and what `A V` has beyond V, in units of `scale`."""
    n = recurrence.n
    v, p = (
        torch.stack(rows, dim=1).double() if rows else torch.zeros(n, 0, dtype=torch.float64)
        for rows in (recurrence._basis, recurrence._waiting)
    )
    return v, torch.from_numpy(recurrence._matrix), p @ torch.from_numpy(recurrence._couplings)


@pytest.mark.parametrize("choosy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KNOWN)
def test_backward_stable(name, dtype, choosy):
    """Ratios in the manner of LAPACK's test suite: below 30, with growth in k divided out."""
    operator = rotated(KNOWN[name], seed=5, dtype=dtype)
    for width in (1, 3):
        recurrence = grown(operator, width, 14, choosy)
        v, t, beyond = pieces(recurrence)
        k, eps = recurrence.k, torch.finfo(dtype).eps
        size = float(torch.linalg.matrix_norm(operator.matrix.double(), 2))
        defect = operator.matrix.double() @ v - (v @ t + beyond) * recurrence.scale
        assert float(torch.linalg.matrix_norm(defect, 2)) / (size * k * eps) < 30
        everything = torch.stack([*recurrence._basis, *recurrence._waiting]).double()
        identity = torch.eye(len(everything), dtype=torch.float64)
        assert float(torch.linalg.matrix_norm(everything @ everything.T - identity, 2)) / (k * eps) < 30
        assert torch.equal(t, t.T)


def test_without_orthogonalisation_the_ratio_explodes():
    """Negative control for the test above: the plain three-term recurrence of blocks loses orthogonality."""
    matrix = rotated(KNOWN["outliers 1e0 to 1e6"], seed=5).matrix
    before, block = torch.zeros(len(matrix), 3, dtype=torch.float64), torch.linalg.qr(spherical(66, 3, stream(2)))[0]
    coupling, basis = torch.zeros(3, 3, dtype=torch.float64), []
    for _ in range(14):
        basis.append(block)
        product = matrix @ block
        residual = product - block @ (block.T @ product) - before @ coupling.T
        before, (block, coupling) = block, torch.linalg.qr(residual)
    basis = torch.cat(basis, dim=1)
    defect = torch.linalg.matrix_norm(basis.T @ basis - torch.eye(42, dtype=torch.float64), 2)
    assert float(defect) / (42 * torch.finfo(torch.float64).eps) > 1e6


def test_couplings_of_waiting_directions_are_needed():
    """Negative control: without what waits, the relation is off by far more than rounding."""
    operator = rotated(KNOWN["power law"])
    recurrence = grown(operator, 3, 10, choosy=True)
    v, t, _ = pieces(recurrence)
    defect = operator.matrix @ v - v @ t * recurrence.scale
    assert float(torch.linalg.matrix_norm(defect, 2)) > 1e-3 * recurrence.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_column_is_the_plain_recurrence(dtype):
    operator = rotated(KNOWN["power law"], dtype=dtype)
    start = sphere(operator.n, stream(1))
    plain, block = Recurrence(start, dtype), BlockRecurrence(start[:, None], dtype)
    for _ in range(12):
        plain.extend(operator.matvec(plain.last[:, 0]))
        block.extend(operator.matmat(block.block))
    ones, others = plain.ritz()[0] * plain.scale, block.ritz()[0] * block.scale
    assert np.allclose(ones, others, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert plain.scale == block.scale
    assert block.rounding == pytest.approx(plain.rounding)


def test_multiplicity_shows_as_often_as_the_block_is_wide():
    operator = rotated(KNOWN["multiplicity 10"])
    for width in (1, 2, 4):
        recurrence = grown(operator, width, 9)
        values = recurrence.ritz()[0] * recurrence.scale
        assert int((values > 2.9).sum()) == width


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dependent_and_zero_columns_are_replaced(dtype):
    """Five columns of rank two: the block keeps its width, orthonormal."""
    one, other = spherical(30, 2, stream(0)).unbind(1)
    start = torch.stack([torch.zeros_like(one), one, one, other, one - 2 * other], dim=1)
    recurrence = BlockRecurrence(start, dtype)
    block = recurrence.block.double()
    assert block.shape == (30, 5)
    assert torch.allclose(block.T @ block, torch.eye(5, dtype=torch.float64), atol=30 * torch.finfo(dtype).eps)
    left = one - block @ (block.T @ one)
    assert space.norm(left) < 30 * torch.finfo(dtype).eps * space.norm(one)


@pytest.mark.parametrize("name", ["rank one", "identity", "multiplicity 10", "n = 1", "n = 2"])
def test_lost_directions_are_replaced_until_the_space_is_full(name):
    """Invariant spaces in every step; all eigenvalues in the end, and no direction more than there are dimensions."""
    operator = rotated(KNOWN[name])
    recurrence = grown(operator, 3, operator.n)
    assert recurrence.exhausted
    assert recurrence.k == operator.n
    assert np.allclose(recurrence.ritz()[0] * recurrence.scale, np.sort(KNOWN[name]), atol=1e-12)


def test_products_that_vanish():
    """A start in the null space of an operator that is not zero, and the zero operator itself."""
    operator = Dense(torch.diag(torch.tensor([2.0**-60, 0, 0, 0, 0], dtype=torch.float64)))
    recurrence = BlockRecurrence(torch.eye(5, dtype=torch.float64)[:, 1:3], torch.float64)
    for _ in range(2):
        recurrence.extend(operator.matmat(recurrence.block))
    assert recurrence.ritz()[0][-1] * recurrence.scale > 2.0**-62
    zero = Dense(torch.zeros(5, 5, dtype=torch.float64))
    assert grown(zero, 2, 2).ritz()[0].tolist() == [0.0] * 4
    assert grown(zero, 2, 2).rounding == 0


@pytest.mark.parametrize("power", [-500, -90, 3, 90, 500])
def test_powers_of_two_change_no_bit(power):
    operator = rotated(KNOWN["power law"])
    one, other = grown(operator, 3, 8, True), grown(Dense(operator.matrix * 2.0**power), 3, 8, True)
    assert other.scale == one.scale * 2.0**power
    assert np.array_equal(one._matrix, other._matrix)
    assert np.array_equal(one._couplings, other._couplings)


def test_steering_keeps_the_span_of_what_waits():
    recurrence = grown(rotated(KNOWN["power law"]), 4, 3)
    before = torch.stack(recurrence._waiting)
    residuals = recurrence.residuals(recurrence.ritz()[1][:, [-1]])
    recurrence.steer(residuals / np.linalg.norm(residuals))
    after = torch.stack(recurrence._waiting)
    assert recurrence.block.shape[1] == 1
    assert torch.allclose(before.T @ before, after.T @ after, atol=1e-14)
    turned = recurrence.residuals(recurrence.ritz()[1][:, [-1]])
    assert abs(turned[0, 0]) == pytest.approx(np.linalg.norm(residuals), rel=1e-12)
    assert np.abs(turned[1:]).max() < 1e-13


def test_admitted_vectors_wait_and_dependent_ones_do_not():
    operator = rotated(KNOWN["power law"])
    recurrence = grown(operator, 2, 4)
    v, _, _ = pieces(recurrence)
    assert recurrence.admit(sphere(operator.n, stream(8)))
    assert recurrence.waiting == 3
    full = BlockRecurrence(torch.eye(4, dtype=torch.float64), torch.float64)
    assert not full.admit(torch.ones(4, dtype=torch.float64))
    assert full.waiting == 4
    recurrence.extend(operator.matmat(recurrence.block))
    assert torch.equal(pieces(recurrence)[0][:, : v.shape[1]], v)


def test_predicted_products_are_products():
    operator = rotated(KNOWN["power law"])
    recurrence = grown(operator, 3, 9, choosy=True)
    values, vectors = recurrence.ritz()
    for j in (0, 5, -1):
        vector = recurrence.combine(vectors[:, j])
        predicted = recurrence.predicted(float(values[j]), vectors[:, j], vector) * recurrence.scale
        assert space.norm(predicted - operator.matvec(vector)) < 1e-14
        residual = space.norm(predicted - values[j] * recurrence.scale * vector)
        claimed = np.linalg.norm(recurrence.residuals(vectors[:, [j]])) * recurrence.scale
        assert residual == pytest.approx(claimed, abs=1e-14)


def test_orthogonalise_gives_up_on_what_lies_in_the_span():
    rows = torch.linalg.qr(spherical(20, 6, stream(0)))[0].T.contiguous().unbind()
    vector = space.combine(torch.arange(6, dtype=torch.float64), rows)
    inside = vector.clone()
    removed, left = orthogonalise(rows, inside)
    assert left < 1e-14
    assert torch.allclose(removed, torch.arange(6, dtype=torch.float64), atol=1e-14)
    assert orthogonalise((), vector)[1] == space.norm(vector)
    fresh = restart(rows, vector)
    assert space.norm(space.inner(rows, fresh)) < 1e-14
    assert torch.equal(fresh, restart(rows, vector))


@pytest.mark.parametrize("size", [0.0, 1e-17, 1e-16, 1e-15, 1e-13])
def test_what_is_left_is_orthogonal_or_nothing(size):
    """Nearly all of the vector lies in the rows' span: one pass of subtractions would leave rounding along them."""
    for seed in range(5):
        rows = torch.linalg.qr(spherical(40, 6, stream(seed)))[0].T.contiguous().unbind()
        vector = space.combine(torch.arange(1.0, 7.0, dtype=torch.float64), rows) + size * sphere(
            40, stream(seed, "new")
        )
        left = orthogonalise(rows, vector)[1]
        assert space.norm(space.inner(rows, vector)) <= 1e-12 * left or left == 0


def test_images_go_along_when_vectors_are_made_orthonormal():
    """From vectors that are far from orthonormal: what comes out is orthonormal, and its images are its products."""
    draw = torch.randn(4, 9, generator=stream(0, "orthonormalise"), dtype=torch.float64)
    matrix = torch.randn(9, 9, generator=stream(1, "orthonormalise"), dtype=torch.float64)
    vectors = [row + 3 * draw[0] for row in draw.clone()]
    images = [matrix @ vector for vector in vectors]
    orthonormalise(vectors, images)
    basis = torch.stack(vectors)
    assert torch.allclose(basis @ basis.T, torch.eye(4, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(torch.stack(images), basis @ matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_plain_recurrence_beside_known_vectors(sign):
    """On a complement, a definite operator keeps its sign: no eigenvalue zero comes back from the known vectors."""
    values = sign * (1 + torch.linspace(0, 1, 40, dtype=torch.float64))
    known = torch.eye(40, dtype=torch.float64)[:3]
    start = sphere(40, stream(0))
    start[:3] = 0
    runs = [Recurrence(start / space.norm(start), torch.float64, beside) for beside in (known.unbind(), ())]
    for run in runs:
        while not run.exhausted and run.k < 40:
            product = values * run.last[:, 0]
            product[:3] = 0
            run.extend(product)
    beside, alone = (run.ritz()[0] * run.scale for run in runs)
    assert runs[0].k == 37
    assert np.allclose(np.sort(beside), np.sort(values[3:].numpy()), atol=1e-12)
    assert np.abs(alone).min() < 1e-12
