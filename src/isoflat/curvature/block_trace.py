"""Exact traces of the Hessian's diagonal blocks under softmax cross-entropy, without a single Hessian product.

Where the output is linear in one tensor while the others stand still, as for every weight of a piecewise linear network,
the tensor's block of the Hessian is that of the Gauss-Newton matrix (the second derivatives of the output in it vanish),
and its trace is a sum over that matrix's diagonal (Ibayashi et al. 2021; `curvature.diagonal`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isoflat.core.errors import DataError, UnsupportedModel, UsageError
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.curvature.diagonal import diagonal_of
from isoflat.curvature.sweeps import check_softmax
from isoflat.risk.batches import pieces
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.network import exactly
from isoflat.risk.routes.output import output_of
from isoflat.risk.rows import MEMORY

LINEAR = 1e-8
"""Largest second derivative of the output along a direction in a tensor, in units of the first, in float64."""

SINGLE = 1e-4
"""The same in float32, where the network runs in nothing wider."""

ROWS = 64
"""Number of rows on which linearity is checked."""


def block_traces(
    risk: EmpiricalRisk, state: State, names: Sequence[str] | None = None, memory: int = MEMORY
) -> dict[str, float]:
    """Trace of the Hessian's block of each tensor, exact up to rounding.

    Costs about as many gradient passes as there are classes, times the positions of a row where it has several.

    Args:
        risk: the empirical risk, with softmax cross-entropy.
        state: weights and buffers at which the traces are taken.
        names: names of trainable tensors; None for all.
        memory: bytes that gradients of single rows may take at a time.

    Raises:
        DataError: there is no data.
        UsageError: the loss is not softmax cross-entropy of the model's output, or a name is unknown.
        UnsupportedModel: the output is not linear in a tensor, which may enter twice (tied weights) or have a smooth
            nonlinearity after it.

    >>> from torch import nn
    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(nn.Linear(1, 2, bias=False))
    >>> data = as_batches((torch.tensor([[2.0]]), torch.tensor([0])))
    >>> risk = EmpiricalRisk(network, as_loss(nn.CrossEntropyLoss()), data)
    >>> traces = block_traces(risk, network.state().replace({"weight": torch.zeros(2, 1)}))
    >>> {name: round(value, 6) for name, value in traces.items()}
    {'weight': 2.0}
    """
    names = list(state.parameters if names is None else names)
    unknown = [name for name in names if name not in state.parameters]
    if unknown:
        raise UsageError(f"no trainable tensor named {', '.join(unknown)}; known: {', '.join(state.parameters)}")
    check_blocks(risk, state, names)
    parts = diagonal_of(risk, state, names, memory)
    return {name: float(part.sum()) for name, part in parts.items()}


def check_blocks(risk: EmpiricalRisk, state: State, names: Sequence[str]) -> None:
    """Check that the Hessian's blocks of some tensors are those of the Gauss-Newton matrix.

    Raises:
        DataError: there is no data.
        UsageError: the loss is not softmax cross-entropy of the model's output.
        UnsupportedModel: on a few rows the output is not linear in each tensor by itself.
    """
    check_softmax(risk, state)
    with exactly(state.device):
        _check_linear(risk, risk.network.widest(state), names)


def _check_linear(risk: EmpiricalRisk, state: State, names: Sequence[str]) -> None:
    batch = next(iter(risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    few = next(pieces(batch, ROWS))
    bent = []
    for name in names:
        tensor = state.parameters[name]
        drawn = torch.randn(tensor.shape, generator=stream(0, "linear", name), dtype=torch.float64).to(state.device)
        direction = (drawn * ((norm(tensor) or 1.0) / (norm(drawn) or 1.0))).to(tensor.dtype)
        step = torch.zeros((), dtype=torch.float64, device=state.device, requires_grad=True)
        first = _derivative(output_of(risk.term(state.replace({name: tensor + step * direction}), few)), step)
        second = _derivative(first, step)
        if norm(second.detach()) > (LINEAR if tensor.dtype == torch.float64 else SINGLE) * norm(first.detach()):
            bent.append(name)
    if bent:
        raise UnsupportedModel(
            f"the output is not linear in {', '.join(bent[:5])} by itself (it enters more than once, as tied weights do, "
            "or a smooth nonlinearity follows), so its block of the Hessian is not that of the Gauss-Newton matrix: "
            "leave it out with names=[...], or estimate its trace"
        )


def _derivative(value: Tensor, step: Tensor) -> Tensor:
    """`d value / d step` for a scalar step, with its graph: the shape of the value."""
    if not value.requires_grad:
        return torch.zeros_like(value)
    seed = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, step, seed, create_graph=True, allow_unused=True)[0]
    if pulled is None or not pulled.requires_grad:
        return torch.zeros_like(value)
    found = torch.autograd.grad(pulled, seed, create_graph=True, allow_unused=True)[0]
    return torch.zeros_like(value) if found is None else found
