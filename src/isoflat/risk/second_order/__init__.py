"""Second-order rules: operations whose own double backward does more than is needed, replaced while a graph is built.

A rule gives an operation a backward pass that can itself be differentiated at little cost: nothing is computed that no
gradient asks for, and piecewise linear operations have no second derivative of their own. All rules are built from
operations that torch differentiates as often as asked, so that losses with derivatives inside stay right.

Adding a rule is adding a file with a constant `RULE`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, final

from torch.overrides import TorchFunctionMode

from isoflat.core.catalogue import entries
from isoflat.risk.second_order.rule import Trace


@contextmanager
def second_order() -> Iterator[Trace]:
    """Differentiate operations by our rules, for the time of a block that builds a gradient graph.

    Values stay the same, and so do shapes and strides. What has no rule, or a form the rule does not cover, is left to
    torch.

    >>> import torch
    >>> with second_order() as trace:
    ...     y = torch.relu(torch.ones(2, requires_grad=True))
    >>> sorted(trace.used)
    ['relu']
    """
    trace = Trace()
    try:
        with _Replacing(trace):
            yield trace
    finally:
        trace.forget()


@cache
def rules() -> dict[Callable[..., Any], tuple[str, Callable[..., Any]]]:
    """The rule's name, and what stands for the operation, for each that has one."""
    found = entries("isoflat.risk.second_order", "RULE").values()
    return {operation: (rule.name, apply) for rule in found for operation, apply in rule.operations.items()}


@final
class _Replacing(TorchFunctionMode):
    """Asks the rules first."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.rules = rules()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in self.rules:
            name, apply = self.rules[func]
            value = apply(self.trace, *args, **named)
            if value is not NotImplemented:
                self.trace.used.add(name)
                return value
        return func(*args, **named)
