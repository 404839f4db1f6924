"""What a second-order rule is, and what rules know about the forward pass they act in."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@final
@dataclass
class Trace:
    """One forward pass under the rules.

    Attributes:
        used: names of the rules that were applied.
    """

    used: set[str] = field(default_factory=set)
    _rectified: tuple[weakref.ref[Tensor], int, Tensor, int] | None = None

    def rectified(self, output: Tensor, source: Tensor) -> None:
        """Remember that `output` is the ReLU of `source`; only the last such pair is remembered."""
        self._rectified = (weakref.ref(output), output._version, source, source._version)

    def source(self, output: Tensor) -> Tensor | None:
        """What `output` is the ReLU of, if it came last and neither has been written to since."""
        if self._rectified is None:
            return None
        known, version, source, old = self._rectified
        same = known() is output and output._version == version and source._version == old
        return source if same else None

    def forget(self) -> None:
        """Let go of what is remembered."""
        self._rectified = None


@final
@dataclass(frozen=True)
class Rule:
    """How certain operations are to be differentiated.

    Attributes:
        name: for the record.
        operations: for each function of torch, `apply(trace, *args, **kwargs)` with the function's own arguments: its
            value, or `NotImplemented` where the rule does not apply.
    """

    name: str
    operations: Mapping[Callable[..., Any], Callable[..., Any]]


def eligible(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors is differentiated backwards only, and all of them are plain."""
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in present)
        and all(map(_plain, present))
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled(present[0].device.type)
        and not torch.is_autocast_enabled(present[0].device.type)
        and not any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in present)
    )


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.is_floating_point()
