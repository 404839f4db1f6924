"""Symmetries of the zoo's architectures, traced once in a process and shared by all tests that use them."""

from dataclasses import replace
from functools import cache

from torch import nn

from cases.zoo import ZOO
from isoflat.symmetry.discover import symmetries
from isoflat.symmetry.found import Found


def found_of(name: str, net: nn.Module | None = None, blind: bool = True) -> Found:
    """The symmetries of an architecture, not proved yet.

    Args:
        name: of the zoo.
        net: a network of this architecture whose weights they act on; the zoo's own without it.
        blind: under cross-entropy, which ignores a constant added to all scores.
    """
    found = _traced(name, blind)
    return found if net is None else replace(found, model=net)


@cache
def _traced(name: str, blind: bool) -> Found:
    loss = nn.CrossEntropyLoss() if blind else None
    return symmetries(ZOO[name].build(), ZOO[name].inputs(), loss=loss, verify=False)
