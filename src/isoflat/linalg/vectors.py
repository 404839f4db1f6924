"""Random vectors, drawn on the CPU from explicit streams, and orthonormal ones, by Gram-Schmidt orthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.core.rng import stream


@final
class Distribution(StrEnum):
    """Distribution of random vectors with mean zero and the identity as covariance."""

    RADEMACHER = "rademacher"
    """Independent signs: no variance from the diagonal."""
    GAUSSIAN = "gaussian"
    """Independent standard normal entries: the variance depends on the eigenvalues alone."""
    SPHERE = "sphere"
    """Uniform on the sphere of radius √n: no variance from multiples of the identity, in any basis."""

    @property
    def level(self) -> bool:
        """Flag that all vectors have the same length."""
        return self is not Distribution.GAUSSIAN

    def columns(self, n: int, k: int, stream: torch.Generator) -> Tensor:
        """The next k vectors, shape `(n, k)`, float64; drawn column by column, so that blocks of any width agree.

        >>> from isoflat.core.rng import stream
        >>> [round(space.norm(Distribution(kind).columns(100, 1, stream(0)))) for kind in ("rademacher", "sphere")]
        [10, 10]
        """
        draw: Callable[[int, int, torch.Generator], Tensor] = {
            Distribution.RADEMACHER: rademacher,
            Distribution.GAUSSIAN: gaussian,
            Distribution.SPHERE: spherical,
        }[self]
        return draw(n, k, stream)


def sphere(n: int, stream: torch.Generator) -> Tensor:
    """A uniform point of the unit sphere in ℝⁿ, shape `(n,)`, float64.

    Uniformity, and independence of the data, is what the certificates rest on.

    >>> from isoflat.core.rng import stream
    >>> round(space.norm(sphere(1000, stream(0))), 12)
    1.0
    """
    draw = torch.randn(n, generator=stream, dtype=torch.float64)
    return draw / space.norm(draw)


def rademacher(n: int, k: int, stream: torch.Generator) -> Tensor:
    """Independent signs ±1, shape `(n, k)`, float64; drawn column by column, so that blocks of any width agree.

    >>> from isoflat.core.rng import stream
    >>> narrow = stream(0)
    >>> bool((rademacher(5, 2, stream(0))[:, 1:] == [rademacher(5, 1, narrow) for _ in range(2)][1]).all())
    True
    """
    columns = [torch.randint(0, 2, (n,), generator=stream, dtype=torch.int8) for _ in range(k)]
    return torch.stack(columns, dim=1).double() * 2 - 1


def gaussian(n: int, k: int, stream: torch.Generator) -> Tensor:
    """Independent standard normal entries, shape `(n, k)`, float64; drawn column by column.

    >>> from isoflat.core.rng import stream
    >>> gaussian(5, 2, stream(0)).shape
    torch.Size([5, 2])
    """
    return torch.stack([torch.randn(n, generator=stream, dtype=torch.float64) for _ in range(k)], dim=1)


def spherical(n: int, k: int, stream: torch.Generator) -> Tensor:
    """Uniform points of the sphere of radius √n as columns, shape `(n, k)`, float64; drawn column by column.

    >>> from isoflat.core.rng import stream
    >>> round(space.norm(spherical(9, 1, stream(0))), 12)
    3.0
    """
    return torch.stack([sphere(n, stream) for _ in range(k)], dim=1) * math.sqrt(n)


def remove(rows: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Subtract a float64 vector's components along orthonormal rows, once and in place; returns them, shape `(k,)`.

    >>> vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> remove([torch.tensor([1.0, 0.0], dtype=torch.float64)], vector).tolist(), vector.tolist()
    ([3.0], [0.0, 4.0])
    """
    coefficients = space.inner(rows, vector)
    space.add(vector, -coefficients, rows)
    return coefficients


def orthogonalise(rows: Sequence[Tensor], residual: Tensor) -> tuple[Tensor, float]:
    """Remove a float64 vector's components along orthonormal rows, in place, until its norm stands still.

    "Twice is enough" (Kahan and Parlett) unless the norm drops again, which happens when the vector lies nearly in the
    rows' span. Where it never stands still, what is left is not orthogonal to anything: its norm is given as zero.

    Args:
        rows: orthonormal vectors of shape `(n,)`, in any precision.
        residual: vector of shape `(n,)`, float64; overwritten.

    Returns:
        Coefficients removed along each row, shape `(k,)`, float64; and the norm of the remainder.

    >>> vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> removed, left = orthogonalise([torch.tensor([1.0, 0.0], dtype=torch.float64)], vector)
    >>> removed.tolist(), left, vector.tolist()
    ([3.0], 4.0, [0.0, 4.0])
    """
    if not rows:
        return torch.zeros(0, dtype=torch.float64, device=residual.device), space.norm(residual)
    # What rough coefficients leave comes out with the next ones, which are exact.
    removed = space.rough_inner(rows, residual, space.norm(residual))
    left = space.subtract_combination(residual, removed, rows)
    norm = space.norm(residual)
    for _ in range(5):
        before = norm
        removed += left
        space.add(residual, -left, rows)
        norm = space.norm(residual)
        if norm > 0.5 * before:
            return removed, norm
        left = space.inner(rows, residual)
    return removed, 0.0


def orthonormalise(vectors: list[Tensor], images: list[Tensor]) -> None:
    """Gram–Schmidt among independent float64 vectors, in place; images, which are linear in the vectors, go along.

    >>> vectors = [torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)]
    >>> images = [vector.clone() for vector in vectors]
    >>> orthonormalise(vectors, images)
    >>> [vector.tolist() for vector in vectors], [image.tolist() for image in images]
    ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    """
    for j, vector in enumerate(vectors):
        removed, size = orthogonalise(vectors[:j], vector)
        if j:
            space.add(images[j], -removed, images[:j])
        vector.div_(size)
        images[j].div_(size)


def gram(left: Sequence[Tensor], right: Sequence[Tensor]) -> NDArray[np.float64]:
    """The symmetric matrix of inner products, halves averaged: shape `(d, d)`."""
    made = np.stack([space.inner(left, row).cpu().numpy() for row in right], axis=1)
    return (made + made.T) / 2


def restart(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """A random unit vector orthogonal to orthonormal rows that do not span the whole space, in float64.

    It depends on the dimension and on the number of rows and on nothing else, so that equal runs stay equal.

    Args:
        rows: orthonormal vectors, each of shape `(n,)`.
        like: vector with the wanted shape and device.

    >>> restart([torch.tensor([1.0, 0.0])], torch.zeros(2)).abs().tolist()
    [0.0, 1.0]
    """
    for attempt in range(10):
        draw = sphere(like.shape[0], stream(0, "restart", len(rows), attempt)).to(like.device)
        _, size = orthogonalise(rows, draw)
        if size:
            return draw.div_(size)
    raise AssertionError("a random vector lies in a proper subspace")
