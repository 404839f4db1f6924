"""ReLU: its second derivative is zero, so every derivative is the same mask applied to something else."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function

from isoflat.risk.second_order import SecondOrderRule, Trace, eligible


@final
class _Rectified(Function):
    """The ReLU of a tensor, in place or not; torch's own double backward would carry zeros back to it."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, inplace: bool) -> Tensor:
        output = torch.relu_(source) if inplace else torch.relu(source)
        if inplace:
            ctx.mark_dirty(source)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        (output,) = ctx.saved_tensors
        return _Masked.apply(gradient, output.detach()), None


@final
class _Masked(Function):
    """A tensor where a ReLU's output is positive, zero elsewhere: its own transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, output: Tensor) -> Tensor:
        ctx.save_for_backward(output)
        return torch.ops.aten.threshold_backward(values, output, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        (output,) = ctx.saved_tensors
        return _Masked.apply(gradient, output), None


rectified = _Rectified.apply
"""ReLU of a tensor, in place if the flag behind it says so."""


def _apply(trace: Trace, input: Tensor, inplace: bool = False) -> Any:
    """Rectify, and remember the pair, because a pooling that follows can do with less."""
    # An operation in place on a view changes its base as well: torch keeps those books.
    if not eligible(input) or (inplace and (input.is_leaf or input._is_view())):
        return NotImplemented
    output = rectified(input, inplace)
    if not inplace:
        trace.remember("relu", output, input, [input])
    return output


def _apply_inplace(trace: Trace, input: Tensor) -> Any:
    return _apply(trace, input, inplace=True)


RULE = SecondOrderRule(
    "relu",
    {
        F.relu: _apply,
        torch.relu: _apply,
        Tensor.relu: _apply,
        torch.relu_: _apply_inplace,
        Tensor.relu_: _apply_inplace,
    },
)
