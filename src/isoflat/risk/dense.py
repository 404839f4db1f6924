"""Sparse gradients become dense: a gradient that names its rows has no place in a vector, and no second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, strided

_PLACES = {"embedding": 6, "embedding_bag": 7}
"""Functions that may ask for a sparse gradient, and the place of the argument that does."""


@contextmanager
def dense_tables() -> Iterator[None]:
    """Tables that are looked up give dense gradients, whatever they ask for; modules are not touched."""
    before = {name: getattr(F, name) for name in _PLACES}
    for name, function in before.items():
        setattr(F, name, _dense(function, _PLACES[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient with an entry for every entry of its tensor."""
    return gradient if gradient is None or gradient.layout is strided else gradient.to_dense()


def _dense(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            args = (*args[:place], False, *args[place + 1 :])
        elif kwargs.get("sparse"):
            kwargs["sparse"] = False
        return function(*args, **kwargs)

    return called
