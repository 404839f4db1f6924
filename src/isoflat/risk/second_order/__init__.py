"""Second-order rules: operations whose own double backward does more than is needed, replaced while a graph is built.

A rule gives an operation a backward pass that can itself be differentiated at little cost: nothing is computed that no
gradient asks for, and piecewise linear operations have no second derivative of their own. All rules are built from
operations that torch differentiates as often as asked, so that losses with derivatives inside stay right.

Adding a rule is adding a file with a constant `RULE`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from isoflat.core.catalogue import entries

_version = attrgetter("_version")


@final
@dataclass(frozen=True)
class SecondOrderRule:
    """Replacement of some operations by functions with cheaper second derivatives.

    Attributes:
        name: name of the rule, for the record.
        operations: replacement of each function of torch, `apply(trace, *args, **kwargs)` with the function's own arguments: its
            value, or `NotImplemented` where the rule does not apply.
    """

    name: str
    operations: Mapping[Callable[..., Any], Callable[..., Any]]


@final
@dataclass(frozen=True)
class _RuleOutput:
    output: weakref.ref[Tensor]
    of: Any
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]


@final
class Trace(TorchFunctionMode):
    """Block in which operations are differentiated by our rules: one forward pass, for which a gradient graph is built.

    Values stay the same, and so do shapes and strides. What has no rule, or a form the rule does not cover, is left to
    torch.

    Attributes:
        used: names of the rules that were applied.

    >>> with Trace() as trace:
    ...     y = torch.relu(torch.ones(2, requires_grad=True))
    >>> sorted(trace.used)
    ['relu']
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        self._constant = False
        self._last: dict[str, _RuleOutput] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation by its rule, if it has one that applies."""
        named = kwargs or {}
        if rule := rules().get(func):
            name, apply = rule
            value = apply(self, *args, **named)
            if value is not NotImplemented:
                self.used.add(name)
                return value
        return func(*args, **named)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        """Let go of what is remembered."""
        self._last.clear()
        super().__exit__(exc_type, exc_val, exc_tb)

    def remember(self, rule: str, output: Tensor, made_of: Any, sources: Sequence[Tensor]) -> None:
        """Note what a rule made an output of; only its last output is remembered, and not kept alive."""
        versions = tuple(map(_version, (output, *sources)))
        self._last[rule] = _RuleOutput(weakref.ref(output), made_of, tuple(sources), versions)

    def recall(self, rule: str, output: Tensor) -> Any:
        """Origin of an output that a rule made; None if it did not, or not last, or if anything was written to since."""
        made = self._last.get(rule)
        if made is None or made.output() is not output:
            return None
        return made.of if made.versions == tuple(map(_version, (output, *made.sources))) else None

    @contextmanager
    def jacobian(self) -> Iterator[None]:
        """Mark that, inside, a backward graph is built of which only the derivative in the cotangent will be asked for.

        Torch's own operations are told at each backward pass what is asked for; a function of ours is not.
        """
        self._constant = True
        try:
            yield
        finally:
            self._constant = False

    def factors(self, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        """Saved tensors of an operation, detached where the backward graph must not depend on them."""
        return tuple(None if t is None else t.detach() for t in saved) if self._constant else saved


@cache
def rules() -> dict[Callable[..., Any], tuple[str, Callable[..., Any]]]:
    """The rule's name, and what stands for the operation, for each that has one."""
    found = entries("isoflat.risk.second_order", "RULE").values()
    return {operation: (rule.name, apply) for rule in found for operation, apply in rule.operations.items()}


def eligible(*tensors: Tensor | None) -> bool:
    """Test of whether a function of these tensors is differentiated backwards only, and all of them are plain."""
    if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    device, differentiated = None, False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return False
        if not tensor.is_floating_point() or forward_ad.unpack_dual(tensor).tangent is not None:
            return False
        device = device or tensor.device.type
        differentiated = differentiated or tensor.requires_grad
    return differentiated and device is not None and not torch.is_autocast_enabled(device)
