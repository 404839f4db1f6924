"""Linear layers: bilinear, so every derivative is again one of three matrix products; sums are taken inside them."""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import Function

from isoflat.risk.second_order import SecondOrderRule, Trace, eligible


@final
class _Linear(Function):
    """`inputs @ weightᵀ + bias` for inputs of shape `(rows, n)`."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.trace = trace
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        return None, *_LinearBackward.apply(ctx.needs_input_grad[1:], outputs, *ctx.trace.factors(*ctx.saved_tensors))


@final
class _LinearBackward(Function):
    """Gradients of a linear layer in inputs, weight and bias; None where not wanted."""

    @staticmethod
    def forward(
        ctx: Any, wanted: tuple[bool, ...], outputs: Tensor, inputs: Tensor, weight: Tensor
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs, inputs, weight)
        return (
            outputs @ weight if wanted[0] else None,
            outputs.T @ inputs if wanted[1] else None,
            outputs.sum(0) if wanted[2] else None,
        )

    @staticmethod
    def backward(  # pyrefly: ignore
        ctx: Any, inputs: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The three are linear in the outputs and in one another's factor, so what comes in takes that factor's place."""
        outputs, old_inputs, old_weight = ctx.saved_tensors
        _, to_outputs, to_inputs, to_weight = ctx.needs_input_grad
        total = bias
        if to_outputs and weight is not None:
            total = F.linear(old_inputs, weight, total)
        if to_outputs and inputs is not None:
            total = F.linear(inputs, old_weight, total) if total is None else torch.addmm(total, inputs, old_weight.T)
        return (
            None,
            None if total is None or not to_outputs else total.expand_as(outputs),
            outputs @ weight if to_inputs and weight is not None else None,
            outputs.T @ inputs if to_weight and inputs is not None else None,
        )


def _apply(trace: Trace, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not eligible(input, weight, bias) or weight.ndim != 2 or input.ndim < 2:
        return NotImplemented
    rows = input.reshape(-1, input.shape[-1])
    return _Linear.apply(trace, rows, weight, bias).view(*input.shape[:-1], len(weight))


RULE = SecondOrderRule("linear", {F.linear: _apply})
