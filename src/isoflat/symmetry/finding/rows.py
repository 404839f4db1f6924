"""Rows of an example that a network is traced on: two, or all of a batch that a network does not take apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from isoflat.core.errors import IsoflatError, UsageError
from isoflat.core.raised import is_out_of_memory
from isoflat.core.state import everywhere

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


def fewest(function: Callable[..., Any], two: Inputs, whole: Inputs) -> Inputs:
    """Two rows of the inputs; all of them where the function cannot be called on two, such as the nodes of a graph.

    Args:
        function: the network's function.
        two: the inputs, cut to two rows.
        whole: the inputs as they are.
    """
    if _points_into_rows(whole):
        return whole
    try:
        with torch.no_grad():
            function(*two[0], **two[1])
    except IsoflatError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return whole  # what fails there as well is said when it is traced
    return two


def aside(module: nn.Module) -> Callable[..., Any]:
    """A module's function, with copies of its buffers: a forward pass may write into them."""

    def function(*args: Any, **kwargs: Any) -> Any:
        buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
        return torch.func.functional_call(module, everywhere(module, buffers), args, kwargs, tie_weights=False)

    return function


def _points_into_rows(inputs: Inputs) -> bool:
    """Test of whether integers may point to rows that a cut removes: on an accelerator that ends the process's use of it."""
    leaves = [leaf for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor) and leaf.ndim]
    whole = [leaf for leaf in leaves if not leaf.is_floating_point() and leaf.dtype is not torch.bool]
    return bool(whole) and leaves[0].device.type != "cpu" and any(len(leaf) != len(leaves[0]) for leaf in whole)
