"""Diagonals of the Gauss-Newton matrix and of the gradients' second moment, exactly.

Both are sums of squares over rows, `Σ_i (J_iᵀ r)²` entry by entry: for the second moment r is the loss's gradient in the
output, for the Gauss-Newton matrix it runs over square roots of the loss's Hessian there (`curvature.sweeps`), under softmax
cross-entropy one for each class. A layer that acts
on one vector per row has `(∂y²)ᵀ a²`, which a backward pass of the whole batch gives; other tensors take the gradient of
every row by itself. For piecewise linear networks the first is the diagonal of the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from isoflat.core.space import ParameterSpace
from isoflat.core.state import State
from isoflat.curvature.fisher import row_counts
from isoflat.curvature.sweeps import Directions, Pass, Sweeps, accumulated, check_canonical, factors, pulled, residual
from isoflat.risk.batches import pieces
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.losses import Loss, TargetLoss
from isoflat.risk.routes.output import check_output
from isoflat.risk.rows import MEMORY, Output, per_row, row_loss


def gauss_newton_diagonal(risk: EmpiricalRisk, state: State, memory: int = MEMORY) -> Tensor:
    """Diagonal of the Gauss-Newton matrix in all trainable tensors, shape `(n,)`, float64.

    Costs about as many gradient passes as there are classes, times the positions of a row where it has several.

    Args:
        risk: the empirical risk, with a canonical loss (`risk.likelihood`).
        state: the point.
        memory: bytes that gradients of single rows may take at a time.

    Raises:
        DataError: there is no data.
        UsageError: the loss's Hessian in the output has no known square roots.
        UnsupportedModel: single rows have no gradients of their own.

    >>> from torch import nn
    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(nn.Linear(1, 2, bias=False))
    >>> data = as_batches((torch.tensor([[2.0]]), torch.tensor([0])))
    >>> risk = EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), data)
    >>> found = gauss_newton_diagonal(risk, network.state().replace({"weight": torch.zeros(2, 1)}))
    >>> [round(value, 6) for value in found.tolist()]
    [1.0, 1.0]
    """
    return state.space.flatten(diagonal_of(risk, state, list(state.parameters), memory))


def diagonal_of(risk: EmpiricalRisk, state: State, names: Sequence[str], memory: int = MEMORY) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix in some tensors, by name, in their shapes."""
    wanted, space = diagonal_pass(risk, state, names, memory), _space(state, names)
    return space.unflatten(accumulated(risk, state, [wanted])[0])


def moment_diagonal(risk: EmpiricalRisk, state: State, memory: int = MEMORY) -> Tensor:
    """Diagonal of the rows' gradients' second moment `C = Σ_i (c_i / Σc) ∇ℓ_i ∇ℓ_iᵀ` (`curvature.fisher`).

    Args:
        risk: the empirical risk, with a loss of output and target.
        state: the point.
        memory: bytes that gradients of single rows may take at a time.

    Raises:
        DataError: there is no data.
        UsageError: rows have no losses of their own.
        UnsupportedModel: single rows have no gradients of their own.

    Returns:
        The diagonal, shape `(n,)`, float64.
    """
    return accumulated(risk, state, [moment_pass(risk, state, memory)])[0]


def diagonal_pass(risk: EmpiricalRisk, state: State, names: Sequence[str] | None = None, memory: int = MEMORY) -> Pass:
    """Pass over the data for `gauss_newton_diagonal`, in all trainable tensors or some of them.

    Raises:
        UsageError: the loss's Hessian in the output has no known square roots.
    """
    check_canonical(risk, state)
    return _squares(risk, state, list(state.parameters if names is None else names), factors, memory, shared=False)


def moment_pass(risk: EmpiricalRisk, state: State, memory: int = MEMORY) -> Pass:
    """Pass over the data for `moment_diagonal`.

    Raises:
        UsageError: rows have no losses of their own.
    """
    row_loss(risk)
    check_output(risk, state)
    return _squares(risk, state, list(state.parameters), residual, memory, shared=True)


def _space(state: State, names: Sequence[str]) -> ParameterSpace:
    return ParameterSpace(tuple(names), tuple(tuple(state.parameters[name].shape) for name in names))


def _squares(
    risk: EmpiricalRisk,
    state: State,
    names: list[str],
    directions: Callable[[Loss], Directions],
    memory: int,
    shared: bool,
) -> Pass:
    """`Σ_i (J_iᵀ r)²` by tensor, each row's over its count where this is shared among its targets."""
    space = _space(state, names)

    def part(sweeps: Sweeps) -> Tensor:
        along = directions(sweeps.loss)
        shares = torch.ones(len(sweeps.z), dtype=torch.float64)
        if shared:
            counts = row_counts(sweeps.loss, sweeps.z.detach(), sweeps.target)
            shares = torch.where(counts > 0, 1 / counts, 0)
        shares = shares.to(state.vector)
        found = _through_layers(sweeps, names, along, shares)
        rest = [name for name in names if name not in found]
        if rest:
            if isinstance(sweeps.loss, TargetLoss) and sweeps.loss.criterion is None and not shared:
                found |= _along_each(risk, state, sweeps, rest, along)
            else:
                found |= _row_by_row(risk, state, sweeps.batch, rest, along, shares, memory)
        return space.flatten(found)

    return Pass(part, space.size)


def _through_layers(sweeps: Sweeps, names: Sequence[str], along: Directions, shares: Tensor) -> dict[str, Tensor]:
    layers = sweeps.layers(names)
    found: dict[str, Tensor] = {}
    squares = [layer.inputs.square() for layer in layers]
    for parts in sweeps.backward(layers, along):
        for layer, square, part in zip(layers, squares, parts, strict=True):
            rows = torch.zeros_like(layer.output) if part is None else part.square() * shares[:, None]
            for name in layer.own:
                made = (rows.T @ square if name == layer.weight else rows.sum(0)).double()
                found[name] = found[name] + made if name in found else made
    return found


def _row_by_row(
    risk: EmpiricalRisk, state: State, batch: Any, names: list[str], along: Directions, shares: Tensor, memory: int
) -> dict[str, Tensor]:
    def squares(output: Output, tensors: dict[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        for parts in pulled(along, output, tensors, target):
            total = {name: total[name] + parts[name].square() for name in names}
        return total

    room = max(1, memory // max(1, sum(state.parameters[name].numel() for name in names) * 4 * state.dtype.itemsize))
    found: dict[str, Tensor] = {}
    for piece, own in zip(pieces(batch, room), shares.split(room), strict=True):
        made = per_row(risk, state, piece, names, squares)
        for name in names:
            part = torch.tensordot(own, made[name], dims=1).double()
            found[name] = found[name] + part if name in found else part
    return found


def _along_each(
    risk: EmpiricalRisk, state: State, sweeps: Sweeps, names: list[str], along: Directions
) -> dict[str, Tensor]:
    """The same where directions are those of a user's function, which are told from whole batches only."""

    def squares(output: Output, tensors: dict[str, Tensor], target: Any, cotangent: Tensor) -> dict[str, Tensor]:
        _, pull = torch.func.vjp(output, tensors)  # pyrefly: ignore
        return {name: part.square() for name, part in pull(cotangent[None])[0].items()}

    found: dict[str, Tensor] = {}
    for cotangent in along(sweeps.z.detach(), sweeps.target):
        made = per_row(risk, state, sweeps.batch, names, squares, (cotangent,))
        for name in names:
            part = made[name].double().sum(0)
            found[name] = found[name] + part if name in found else part
    return found
