"""Functions of each row of the data by itself: its loss, gradients of that and of its output, and forward derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from isoflat.core.errors import UnsupportedModel, UsageError
from isoflat.core.raised import first_line, is_out_of_memory
from isoflat.core.state import State
from isoflat.risk.batches import alone, move, pieces
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import TargetLoss, split
from isoflat.risk.outputs import mapped

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
    check_apart(risk)
    return risk.loss


def check_apart(risk: EmpiricalRisk) -> None:
    """Refuse a question about single rows where these cannot be taken apart.

    Raises:
        UsageError: they cannot.
    """
    if risk.batches.whole is not None:
        raise UsageError(f"needs rows that can be taken apart, and {risk.batches.whole}")


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
        return risk.network(moved, lambda model: loss.by_row(loss.output(model, inputs), target))

    made: Callable[[Tensors], Tensor] = losses
    for direction in directions:
        made = _along(made, state.space.unflatten(direction.to(state.dtype)))
    try:
        return made(dict(state.parameters)).detach()
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"sample='auto' and the Fisher-Rao norm need forward derivatives of each example's loss, and the network has "
            f"none ({first_line(error)}): leave them out"
        ) from error


def _along(function: Callable[[Tensors], Tensor], direction: Tensors) -> Callable[[Tensors], Tensor]:
    return lambda parameters: torch.func.jvp(function, (parameters,), (direction,))[1]


def packed_loss(risk: EmpiricalRisk, state: State, batch: Any) -> TargetLoss:
    """The loss as a function of a batch's output as one tensor (`risk.outputs`), by a forward pass where it may be several.

    Raises:
        UsageError: rows have no losses of their own.
    """
    loss = row_loss(risk)
    if not loss.whole:
        return loss
    inputs, target = split(move(alone(batch), state.device, state.dtype))
    with torch.no_grad():
        return loss.packed(risk.network(state, partial(loss.output, inputs=inputs)), target)[0]


MEMORY = 1 << 28
"""Bytes that gradients of single rows may take at a time."""

Output = Callable[[Mapping[str, Tensor]], Tensor]
"""A single row's output, with its leading dimension, as a function of some of the tensors."""


def per_row(
    risk: EmpiricalRisk,
    state: State,
    batch: Any,
    names: Sequence[str],
    work: Callable[..., Any],
    beside: Sequence[Tensor] = (),
) -> Any:
    """Results of `work` on each row by itself, all at once, with the rows along a first dimension.

    Args:
        risk: empirical risk with a loss of output and target.
        state: weights and buffers.
        batch: batch of the data.
        names: names of the tensors that the output is a function of.
        work: function of the output, these tensors and the row's target, both with a leading dimension of one, and of the
            row of what is beside.
        beside: further tensors with as many rows.

    Raises:
        UsageError: the loss is no function of output and target.
        UnsupportedModel: the network cannot be run on single rows side by side.
    """
    loss = row_loss(risk)
    inputs, target = split(move(alone(batch), state.device, state.dtype))
    given: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    chosen = {name: state.parameters[name] for name in names}

    def row(inputs: Any, target: Any, *own: Tensor) -> Any:
        def output(tensors: Mapping[str, Tensor]) -> Tensor:
            made = risk.network(state.replace(tensors), partial(loss.output, inputs=_lifted(inputs)))
            return loss.packed(made, lone)[1]

        lone = mapped(target, lambda tensor: tensor[None])
        return work(output, chosen, lone, *own)

    try:
        return torch.func.vmap(row)(given, target, *beside)
    except (RuntimeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModel(
            f"single rows have no gradients of their own through torch.func.vmap: {first_line(error)}"
        ) from error


def row_gradients(risk: EmpiricalRisk, state: State, batch: Any, memory: int = MEMORY) -> Iterator[tuple[Any, Tensor]]:
    """Gradients `∇ total_i` of the rows of a batch, piece by piece: the piece, and a tensor of shape `(rows, n)`."""
    names = list(state.parameters)

    room = max(1, memory // (state.space.size * (2 * state.dtype.itemsize + 8)))
    for piece in pieces(batch, room):
        loss = packed_loss(risk, state, piece)

        def gradient(output: Output, tensors: dict[str, Tensor], target: Tensor, loss: TargetLoss = loss) -> Tensor:
            made = torch.func.grad(lambda given: loss.summed(output(given), target))(tensors)
            return torch.cat([made[name].reshape(-1) for name in names])

        yield piece, per_row(risk, state, piece, names, gradient)


def _lifted(inputs: Any) -> Any:
    """One row as a batch of one."""
    return tree_map_only(Tensor, lambda part: part[None], inputs)
