"""Symmetries of the zoo's architectures, traced once in a process and shared by all tests that use them."""

from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

from torch import nn

from cases.zoo import ZOO
from isoflat.symmetry.finding import discover
from isoflat.symmetry.found import Found

_graphs: dict[str, Any] = {}
"""Tracing takes most of the time, and is the same for every loss."""


def found_of(name: str, net: nn.Module | None = None, blind: bool = True) -> Found:
    """The symmetries of an architecture, not proved yet.

    Args:
        name: of the zoo.
        net: a network of this architecture whose weights they act on; the zoo's own without it.
        blind: under cross-entropy, which ignores a constant added to all scores.
    """
    found = _found(name, blind)
    return found if net is None else replace(found, model=net)


@cache
def _found(name: str, blind: bool) -> Found:
    trace, loss = discover.trace, nn.CrossEntropyLoss() if blind else None

    def once(*arguments: Any) -> Any:
        if name not in _graphs:
            _graphs[name] = trace(*arguments)
        return _graphs[name]

    with mock.patch.object(discover, "trace", once):
        return discover.symmetries(_built(name), ZOO[name].inputs(), loss=loss, verify=False)


@cache
def _built(name: str) -> nn.Module:
    return ZOO[name].build()
