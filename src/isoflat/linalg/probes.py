"""Random vectors, drawn on the CPU from explicit streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from isoflat.core import space


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
