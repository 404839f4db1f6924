"""The loss of each row of the data by itself, and its derivatives along given directions, by forward derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isoflat.core.errors import UnsupportedModel, UsageError
from isoflat.core.state import State
from isoflat.risk.batches import alone, move
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import TargetLoss, split
from isoflat.risk.routes.guarded import is_out_of_memory

Tensors = dict[str, Tensor]


def row_loss(risk: EmpiricalRisk) -> TargetLoss:
    """The loss, if each row has one of its own.

    Raises:
        UsageError: it has not.
    """
    if not isinstance(risk.loss, TargetLoss):
        raise UsageError(
            f"needs the loss of each example, as a torch.nn criterion or a function of output and target has it; "
            f"{risk.loss.label} has one for the whole batch only"
        )
    return risk.loss


def derivative(risk: EmpiricalRisk, state: State, batch: Any, *directions: Tensor) -> Tensor:
    """The derivative of each row's summed loss along all directions in turn, shape `(rows,)`; no weight applied.

    Args:
        risk: empirical risk with a loss of output and target.
        state: weights and buffers.
        batch: batch of the data.
        directions: vectors of shape `(n,)`, as many as the order of the derivative.

    Raises:
        UsageError: rows have no losses of their own.
        UnsupportedModel: an operation of the network has no forward derivative.
    """
    loss = row_loss(risk)
    inputs, target = split(move(alone(batch), state.device, state.dtype))

    def losses(parameters: Tensors) -> Tensor:
        moved = State(parameters, state.frozen, state.buffers, state.constants)
        return loss.by_row(risk.network(moved, lambda model: loss.output(model, inputs)), target)

    made: Callable[[Tensors], Tensor] = losses
    for direction in directions:
        made = _along(made, state.space.unflatten(direction.to(state.dtype)))
    try:
        return made(dict(state.parameters)).detach()
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"sample='auto' and the Fisher-Rao norm need forward derivatives of each example's loss, and the network has "
            f"none ({reason}): leave them out"
        ) from error


def _along(function: Callable[[Tensors], Tensor], direction: Tensors) -> Callable[[Tensors], Tensor]:
    return lambda parameters: torch.func.jvp(function, (parameters,), (direction,))[1]
