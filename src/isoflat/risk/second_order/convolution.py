"""Convolution: bilinear, so every derivative is again one of three convolutions, and only those asked for are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from isoflat.risk.second_order.rule import Rule, Trace, eligible


@final
@dataclass(frozen=True)
class _Window:
    """How the kernel moves, and whether channels lie side by side in memory meanwhile."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    across: bool

    def laid(self, tensor: Tensor) -> Tensor:
        """The tensor as it is to lie; differentiable."""
        return tensor.contiguous(memory_format=torch.channels_last) if self.across else tensor

    def convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        inputs, weight = self.laid(inputs), self.laid(weight)
        return F.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, outputs: Tensor, inputs: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Any, ...]:
        """Its transposes in inputs, weight and bias, as far as wanted; None for the others."""
        outputs, inputs, weight = map(self.laid, (outputs, inputs, weight))
        window = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        return torch.ops.aten.convolution_backward(outputs, inputs, weight, [len(weight)], *window, wanted)


@final
class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, window: _Window, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(inputs, weight)
        return window.convolve(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        wanted = list(ctx.needs_input_grad[1:])
        return None, *_Gradients.apply(ctx.window, wanted, ctx.window.laid(outputs), *ctx.saved_tensors)


@final
class _Gradients(Function):
    """With respect to inputs, weight and bias; None where not wanted."""

    @staticmethod
    def forward(
        ctx: Any, window: _Window, wanted: list[bool], outputs: Tensor, inputs: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.window = window
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs, inputs, weight)
        return window.transpose(outputs, inputs, weight, wanted)

    @staticmethod
    def backward(  # pyrefly: ignore
        ctx: Any, inputs: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The three are linear in the outputs and in one another's factor, so what comes in takes that factor's place."""
        outputs, old_inputs, old_weight = ctx.saved_tensors
        window, (to_outputs, to_inputs, to_weight) = ctx.window, ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [None] * 3
        if to_outputs:
            found[0] = _sum(
                None if inputs is None else window.convolve(inputs, old_weight, bias),
                None if weight is None else window.convolve(old_inputs, weight, bias if inputs is None else None),
                bias[:, None, None].expand_as(outputs)
                if inputs is None and weight is None and bias is not None
                else None,
            )
        if to_inputs and weight is not None:
            found[1] = window.transpose(outputs, old_inputs, weight, [True, False, False])[0]
        if to_weight and inputs is not None:
            found[2] = window.transpose(outputs, inputs, old_weight, [False, True, False])[1]
        return None, None, *found


def _sum(*parts: Tensor | None) -> Tensor | None:
    """Of those that are there."""
    total = None
    for part in parts:
        total = part if total is None else total if part is None else total + part
    return total


def _apply(  # noqa: PLR0913
    trace: Trace,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not eligible(input, weight, bias) or input.ndim != 4 or padding == "same":
        return NotImplemented
    padding = 0 if padding == "valid" else padding
    # Channels side by side save a processor's library its own rearranging; with a single one there is nothing to gain.
    across = input.device.type == "cpu" and input.dtype == torch.float32 and groups == 1 and input.shape[1] > 1
    window = _Window(_pair(stride), _pair(padding), _pair(dilation), groups, across)
    output = _Convolution.apply(window, window.laid(input), window.laid(weight), bias)
    as_found = any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in (input, weight)
    )
    return output.contiguous() if across and not as_found else output


RULE = Rule("convolution", {F.conv2d: _apply})
