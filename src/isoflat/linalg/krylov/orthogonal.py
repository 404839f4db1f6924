"""Gram–Schmidt that is repeated until it has worked, and what takes the place of a direction that is lost in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isoflat.core import space
from isoflat.core.streams import stream
from isoflat.linalg.probes import sphere


def orthogonalise(rows: Sequence[Tensor], residual: Tensor) -> tuple[Tensor, float]:
    """Remove a float64 vector's components along orthonormal rows, in place, until its norm stands still.

    "Twice is enough" (Kahan and Parlett) unless the norm drops again, which happens when the vector lies nearly in the
    rows' span. Where it never stands still, what is left is not orthogonal to anything: its norm is given as zero.

    Args:
        rows: orthonormal, each of shape `(n,)`, in any precision.
        residual: shape `(n,)`, float64.

    Returns:
        What was removed along each row, shape `(k,)`, float64; and the norm of what is left.

    >>> vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    >>> removed, left = orthogonalise([torch.tensor([1.0, 0.0], dtype=torch.float64)], vector)
    >>> removed.tolist(), left, vector.tolist()
    ([3.0], 4.0, [0.0, 4.0])
    """
    removed = torch.zeros(len(rows), dtype=torch.float64, device=residual.device)
    norm = space.norm(residual)
    if not rows:
        return removed, norm
    for sweep in range(6):
        coefficients = space.inner(rows, residual)
        space.add(residual, -coefficients, rows)
        removed += coefficients
        before, norm = norm, space.norm(residual)
        if sweep >= 1 and norm > 0.5 * before:
            return removed, norm
    return removed, 0.0


def restart(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """A random unit vector orthogonal to orthonormal rows that do not span the whole space, in float64.

    It depends on the dimension and on the number of rows and on nothing else, so that equal runs stay equal.

    Args:
        rows: each of shape `(n,)`.
        like: a vector of the shape and on the device that are wanted.

    >>> restart([torch.tensor([1.0, 0.0])], torch.zeros(2)).abs().tolist()
    [0.0, 1.0]
    """
    for attempt in range(10):
        draw = sphere(like.shape[0], stream(0, "restart", len(rows), attempt)).to(like.device)
        _, size = orthogonalise(rows, draw)
        if size:
            return draw.div_(size)
    raise AssertionError("a random vector lies in a proper subspace")
