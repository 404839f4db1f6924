"""Random vectors, drawn on the CPU from explicit streams."""

from __future__ import annotations

import torch
from torch import Tensor

from isoflat.core import space


def sphere(n: int, stream: torch.Generator) -> Tensor:
    """A uniform point of the unit sphere in ℝⁿ, shape `(n,)`, float64.

    Uniformity, and independence of the data, is what the certificates rest on.

    >>> from isoflat.core.streams import stream
    >>> round(space.norm(sphere(1000, stream(0))), 12)
    1.0
    """
    draw = torch.randn(n, generator=stream, dtype=torch.float64)
    return draw / space.norm(draw)


def rademacher(n: int, k: int, stream: torch.Generator) -> Tensor:
    """Independent signs ±1, shape `(n, k)`, float64; drawn column by column, so that blocks of any width agree.

    >>> from isoflat.core.streams import stream
    >>> narrow = stream(0)
    >>> bool((rademacher(5, 2, stream(0))[:, 1:] == [rademacher(5, 1, narrow) for _ in range(2)][1]).all())
    True
    """
    columns = [torch.randint(0, 2, (n,), generator=stream, dtype=torch.int8) for _ in range(k)]
    return torch.stack(columns, dim=1).double() * 2 - 1
