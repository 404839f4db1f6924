"""Second-order rules, and the record of the forward pass that they act in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@final
@dataclass(frozen=True)
class _RuleOutput:
    output: weakref.ref[Tensor]
    of: Any
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


@final
@dataclass
class Trace:
    """One forward pass under the rules.

    Attributes:
        used: names of the rules that were applied.
    """

    used: set[str] = field(default_factory=set)
    _constant: bool = False
    _last: dict[str, _RuleOutput] = field(default_factory=dict)

    def remember(self, rule: str, output: Tensor, made_of: Any, sources: Sequence[Tensor]) -> None:
        """Note what a rule made an output of; only its last output is remembered, and not kept alive."""
        self._last[rule] = _RuleOutput(weakref.ref(output), made_of, tuple(sources), _versions(output, *sources))

    def recall(self, rule: str, output: Tensor) -> Any:
        """Origin of an output that a rule made; None if it did not, or not last, or if anything was written to since."""
        made = self._last.get(rule)
        if made is None or made.output() is not output or made.versions != _versions(output, *made.sources):
            return None
        return made.of

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

    def forget(self) -> None:
        """Let go of what is remembered."""
        self._last.clear()


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


def eligible(*tensors: Tensor | None) -> bool:
    """Test of whether a function of these tensors is differentiated backwards only, and all of them are plain."""
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in present)
        and all(map(_plain, present))
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled(present[0].device.type)
        and not any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in present)
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_floating_point()
