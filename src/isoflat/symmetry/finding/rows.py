"""Rows of an example that a network is traced on: two, or all of a batch that a network does not take apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from isoflat.core.errors import UnsupportedModel, UsageError

T = TypeVar("T")

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword inputs."""


def inputs_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs with two rows: claims do not depend on their number, but one row hides too much.

    Raises:
        UsageError: there is no tensor with rows.
    """
    placed, named = all_inputs(example)
    counts = [len(leaf) for leaf in tree_leaves((placed, named)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not counts or counts[0] == 0:
        came = ", ".join(type(part).__name__ for part in (*placed, *named.values())) or "nothing"
        raise UsageError(
            f"expected an input with rows as the example, got {came}: wrap the network in a module whose forward takes tensors "
            "and makes of them what the network wants; geometry='layerwise' needs no tracing"
        )

    def two(leaf: Tensor) -> Tensor:
        if not leaf.ndim or len(leaf) != counts[0]:
            return leaf
        return torch.cat([leaf, leaf]).detach() if counts[0] == 1 else leaf.detach()[:2]

    return tree_map_only(Tensor, two, placed), tree_map_only(Tensor, two, named)


def all_inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs with all rows."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def on_few_rows(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], find: Callable[[tuple[Any, ...], Mapping[str, Any]], T]
) -> T:
    """Whatever is found on two rows of the inputs; on all of them where rows cannot be cut or the network needs them all.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        find: finds something on inputs.

    Raises:
        UsageError: no input holds a tensor with rows.
        UnsupportedModel: the network cannot be traced on all rows either.
    """
    both = inputs_of((*args, *kwargs.values()))[0]
    cut = both[: len(args)], dict(zip(kwargs, both[len(args) :], strict=True))
    if _points_into_rows((args, kwargs)):
        return find(args, kwargs)
    try:
        return find(*cut)
    except UnsupportedModel:
        # A graph's nodes, or a table of pairs: a part of it is no example.
        if _shapes(cut) == _shapes((args, kwargs)):
            raise
        return find(args, kwargs)


def _shapes(inputs: Inputs) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor)]


def _points_into_rows(inputs: Inputs) -> bool:
    """Test of whether integers may point to rows that a cut removes: on an accelerator that ends the process's use of it."""
    leaves = [leaf for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    whole = [leaf for leaf in leaves if not leaf.is_floating_point() and leaf.dtype is not torch.bool]
    return bool(whole) and leaves[0].device.type != "cpu" and any(len(leaf) != len(leaves[0]) for leaf in whole)
