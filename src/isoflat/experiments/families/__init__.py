"""Networks that experiments train: one file per family, each with a `build` that depends on its arguments only."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from importlib import import_module

from torch import nn

from isoflat.core.errors import UnknownName, UsageError


def names() -> tuple[str, ...]:
    """Names of all families, one for each file here.

    >>> names()
    ('alexnet', 'decoder', 'lenet', 'mlp', 'normed', 'vgg')
    """
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find(name: str) -> Callable[..., nn.Module]:
    """The `build` of a family.

    Raises:
        UnknownName: there is no such family; the nearest names are offered.

    >>> tuple(find("mlp")((4, 3, 2)).children())
    (Linear(in_features=4, out_features=3, bias=False), ReLU(), Linear(in_features=3, out_features=2, bias=False))
    """
    known = names()
    if name not in known:
        raise UnknownName("family", name, known)
    return import_module(f"{__name__}.{name}").build


def scaled(count: int, width: float) -> int:
    """The number of channels or units in a network of another width; at least one.

    Args:
        count: number of channels or units in the usual network.
        width: width of the network, as a multiple of the usual one.

    Raises:
        UsageError: the width is not positive.

    >>> scaled(64, 0.125), scaled(64, 1), scaled(64, 0.001)
    (8, 64, 1)
    """
    if not 0 < width < math.inf:
        raise UsageError(f"width is a multiple of the usual channels and units and must be positive, got {width}")
    return max(1, round(count * width))
