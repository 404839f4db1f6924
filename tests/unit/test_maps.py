"""Linear maps of frames: `pull` is the transpose of `push`, whatever they are composed of."""

import pytest
import torch

from isoflat.core.streams import stream
from isoflat.linalg.maps import Complement, Composition, Diagonal, Embedding, Identity, Shear, Term


def _draw(*shape, label="maps"):
    return torch.randn(*shape, generator=stream(0, label, shape), dtype=torch.float64)


SHEAR = Shear(
    20, (Term(slice(0, 12), slice(12, 16), (2, 2, 3, 1), _draw(2, 3)), Term(slice(12, 16), slice(16, 20), (4, 1, 1, 1), _draw(4, 1)))
)  # fmt: skip
MAPS = {
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
    still = Shear(20, tuple(Term(t.source, t.target, t.view, torch.zeros_like(t.weights)) for t in SHEAR.terms))
    u = _draw(20, 1)
    assert torch.equal(still.push(u), u)
    assert not torch.allclose(SHEAR.push(u), u)
