"""Linear maps of frames: `pull` is the transpose of `push`, whatever they are composed of."""

import pytest
import torch

from isoflat.core.rng import stream
from isoflat.linalg.maps import (
    Complement,
    Composition,
    Contraction,
    Diagonal,
    Embedding,
    Identity,
    Mixing,
    Shear,
    TensorSlices,
)


def _draw(*shape, label="maps"):
    return torch.randn(*shape, generator=stream(0, label, shape), dtype=torch.float64)


SHEAR = Shear(
    20,
    (
        Contraction(slice(0, 12), slice(12, 16), (2, 2, 3, 1), _draw(2, 3)),
        Contraction(slice(12, 16), slice(16, 20), (4, 1, 1, 1), _draw(4, 1)),
    ),
)
TURNED = Shear(20, (Contraction(slice(0, 12), slice(12, 16), (2, 2, 3, 1), _draw(2, 3), turned=True),))
MIXING = Mixing(
    20,
    (
        (_draw(2, 2, 2), (TensorSlices(slice(0, 12), (4, 3), 0, torch.tensor([[0, 3], [2, 1]]), torch.arange(2)),)),
        (
            _draw(1, 3, 3),
            (
                TensorSlices(slice(0, 12), (4, 3), 1, torch.tensor([[2, 0]]), torch.tensor([1, 2]), (0, 1, 2)),
                TensorSlices(slice(12, 20), (2, 4), 1, torch.tensor([[3]]), torch.tensor([0])),
            ),
        ),
    ),
)
MAPS = {
    "turned shear": TURNED,
    "mixing": MIXING,
    "identity": Identity(20),
    "diagonal": Diagonal(_draw(20)),
    "shear": SHEAR,
    "embedding": Embedding(20, torch.tensor([3, 5, 19])),
    "complement": Complement(torch.linalg.qr(_draw(20, 3))[0]),
    "composition": Composition((SHEAR, Embedding(20, torch.arange(2, 15)), Diagonal(_draw(13)))),
}


@pytest.mark.parametrize("name", MAPS)
def test_pull_is_the_transpose_of_push(name):
    linear = MAPS[name]
    u, v = _draw(linear.columns, 2, label="u"), _draw(linear.rows, 2, label="v")
    assert torch.allclose(linear.push(u).T @ v, u.T @ linear.pull(v), rtol=1e-12)
    assert linear.push(u.float()).dtype == torch.float32


def test_a_shear_without_its_weights_is_the_identity():
    still = Shear(20, tuple(Contraction(t.source, t.target, t.view, torch.zeros_like(t.weights)) for t in SHEAR.terms))
    u = _draw(20, 1)
    assert torch.equal(still.push(u), u)
    assert not torch.allclose(SHEAR.push(u), u)


def test_a_turned_shear_contracts_the_transposed_factor():
    view = (2, 2, 3, 1)
    u = _draw(20, 1)
    factor = u[:12, 0].view(2, 2, 3)
    laid_out = u.clone()
    laid_out[:12, 0] = factor.transpose(1, 2).reshape(-1)
    plain = Shear(20, (Contraction(slice(0, 12), slice(12, 16), view, TURNED.terms[0].weights),))
    assert torch.allclose(TURNED.push(laid_out)[12:], plain.push(u)[12:], rtol=1e-12)
    assert not torch.allclose(TURNED.push(u)[12:], plain.push(u)[12:])


def test_mixing_multiplies_the_slices_it_names_and_nothing_else():
    """Against the same written out entry by entry."""
    (rows, _), (columns, _) = MIXING.terms
    u = _draw(20, 1)
    first, second = u[:12, 0].clone().view(4, 3), u[12:, 0].clone().view(2, 4)
    for matrix, places in zip(rows, ((0, 3), (2, 1)), strict=True):
        first[list(places)] = matrix @ first[list(places)]
    vector = torch.stack([second[:, 3], first[1:3, 2], first[1:3, 0]])
    second[:, 3], first[1:3, 2], first[1:3, 0] = columns[0] @ vector
    wanted = torch.cat([first.reshape(-1), second.reshape(-1)])
    assert torch.allclose(MIXING.push(u)[:, 0], wanted, rtol=1e-12)
    inverse = Mixing(20, tuple((torch.linalg.inv(matrix), parts) for matrix, parts in reversed(MIXING.terms)))
    assert torch.allclose(inverse.push(MIXING.push(u)), u, rtol=1e-9)
