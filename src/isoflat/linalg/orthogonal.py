"""Gram-Schmidt orthogonalisation, repeated until the norm stands still, and random restarts of lost directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from isoflat.core import space
from isoflat.core.rng import stream
from isoflat.linalg.probes import sphere


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
    removed = space.rough(rows, residual, space.norm(residual))
    left = space.sweep(residual, removed, rows)
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
