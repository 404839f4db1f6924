"""Convolution: bilinear, so every derivative is again one of three convolutions, and only those asked for are computed.

With a max-pooling behind it, it is bilinear still once the places of the maxima are known: the two are then one
operation, which goes through the rows bit by bit, so that what the pooling drops is never held for all rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules.utils import _pair

from isoflat.risk.second_order import SecondOrderRule, Trace, eligible
from isoflat.risk.second_order.pooling import pick, spread

BITE = 2**20
"""Entries of a convolution's output that are held before they are pooled: as many as fit into a processor's cache."""


@final
@dataclass(frozen=True)
class _Pooling:
    """Pooling of planes of a certain size, from places that are disjoint or not."""

    size: tuple[int, int]
    disjoint: bool


@final
@dataclass(frozen=True)
class _Window:
    """Strides and padding of the kernel, the memory format meanwhile, and the pooling that follows."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    across: bool
    pooling: _Pooling | None = None

    def laid(self, tensor: Tensor) -> Tensor:
        """Tensor in the memory format of the window; differentiable."""
        return tensor.contiguous(memory_format=torch.channels_last) if self.across else tensor

    def forward(self, places: Tensor | None, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, pooled if there are places."""
        if places is None:
            return self._convolve(inputs, weight, bias)
        count = self._rows(places)
        parts = zip(inputs.split(count), places.split(count), strict=True)
        return torch.cat([pick(self._convolve(part, weight, bias), where, self.across) for part, where in parts])

    def transpose(
        self, places: Tensor | None, outputs: Tensor, inputs: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """The transposes in inputs, weight and bias, as far as wanted; None for the others."""
        if places is None or self.pooling is None:
            return self._transpose(outputs, inputs, weight, wanted)
        size, disjoint, count = self.pooling.size, self.pooling.disjoint, self._rows(places)
        found = [
            self._transpose(spread(values, where, size, disjoint, self.across), part, weight, wanted)
            for values, where, part in zip(*(t.split(count) for t in (outputs, places, inputs)), strict=True)
        ]
        by_inputs, by_weight, by_bias = zip(*found, strict=True)
        return (
            torch.cat(by_inputs) if wanted[0] else None,
            torch.stack(by_weight).sum(0) if wanted[1] else None,
            torch.stack(by_bias).sum(0) if wanted[2] else None,
        )

    def _rows(self, places: Tensor) -> int:
        """Number of rows of an even part of all rows."""
        size = 0 if self.pooling is None else self.pooling.size[0] * self.pooling.size[1]
        rows, most = len(places), max(1, BITE // (places.shape[1] * size))
        return -(-rows // -(-rows // most))

    def _convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs, weight = self.laid(inputs), self.laid(weight)
        return F.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _transpose(
        self, outputs: Tensor, inputs: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        outputs, inputs, weight = map(self.laid, (outputs, inputs, weight))
        window = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        found = (None, None)
        if any(wanted[:2]):
            made = torch.ops.aten.convolution_backward(outputs, inputs, weight, None, *window, [*wanted[:2], False])
            found = made[:2]
        # Torch's own sum adds in pairs: more accurate than the convolution's.
        return *found, outputs.sum((0, 2, 3)) if wanted[2] else None


@final
class _Convolution(Function):
    """Convolution of inputs, weight and bias; values, if pooled, are picked from an earlier convolution."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        trace: Trace,
        window: _Window,
        made: Tensor | None,
        places: Tensor | None,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.trace, ctx.window = trace, window
        ctx.save_for_backward(places, inputs, weight)
        return (
            window.forward(None, inputs, weight, bias)
            if made is None or places is None
            else pick(made, places.contiguous())
        )

    @staticmethod
    def backward(ctx: Any, outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        wanted = list(ctx.needs_input_grad[4:])
        outputs = outputs if ctx.window.pooling else ctx.window.laid(outputs)
        factors = ctx.trace.factors(*ctx.saved_tensors)
        return None, None, None, None, *_ConvolutionBackward.apply(ctx.window, wanted, outputs, *factors)


@final
class _ConvolutionBackward(Function):
    """Gradients of a convolution in inputs, weight and bias; None where not wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        window: _Window,
        wanted: list[bool],
        outputs: Tensor,
        places: Tensor | None,
        inputs: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.window = window
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs, places, inputs, weight)
        return window.transpose(places, outputs, inputs, weight, wanted)

    @staticmethod
    def backward(  # pyrefly: ignore
        ctx: Any, inputs: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The three are linear in the outputs and in one another's factor, so what comes in takes that factor's place."""
        outputs, places, old_inputs, old_weight = ctx.saved_tensors
        window, (to_outputs, _, to_inputs, to_weight) = ctx.window, ctx.needs_input_grad[2:]
        found: list[Tensor | None] = [None] * 4
        if to_outputs:
            alone = bias is not None and inputs is None and weight is None
            found[0] = _sum(
                None if inputs is None else window.forward(places, inputs, old_weight, bias),
                None
                if weight is None
                else window.forward(places, old_inputs, weight, None if inputs is not None else bias),
                bias[:, None, None].expand_as(outputs) if alone else None,
            )
        if to_inputs and weight is not None:
            found[2] = window.transpose(places, outputs, old_inputs, weight, [True, False, False])[0]
        if to_weight and inputs is not None:
            found[3] = window.transpose(places, outputs, inputs, old_weight, [False, True, False])[1]
        return None, None, *found


def _sum(*parts: Tensor | None) -> Tensor | None:
    """Sum of the tensors that are not None."""
    total = None
    for part in parts:
        total = part if total is None else total if part is None else total + part
    return total


@final
@dataclass(frozen=True)
class _Convolved:
    """Arguments of a convolution."""

    trace: Trace
    window: _Window
    inputs: Tensor
    weight: Tensor
    bias: Tensor | None

    def pooled(self, made: Tensor, places: Tensor, disjoint: bool) -> Tensor:
        """Convolution and pooling in one, from the convolution's values."""
        window = replace(self.window, pooling=_Pooling((made.shape[-2], made.shape[-1]), disjoint))
        places = window.laid(places)
        return _Convolution.apply(self.trace, window, made, places, self.inputs, self.weight, self.bias)


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
    inputs, kernel = window.laid(input), window.laid(weight)
    output = _Convolution.apply(trace, window, None, None, inputs, kernel, bias)
    as_found = any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in (input, weight)
    )
    output = output.contiguous() if across and not as_found else output
    factors = [factor for factor in (inputs, kernel, bias) if factor is not None]
    trace.remember("convolution", output, _Convolved(trace, window, inputs, kernel, bias), factors)
    return output


RULE = SecondOrderRule("convolution", {F.conv2d: _apply})
