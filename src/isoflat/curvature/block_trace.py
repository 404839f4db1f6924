"""Exact traces of the Hessian's diagonal blocks under softmax cross-entropy, without a single Hessian product.

Where the output z is linear in one tensor while the others stand still, as for every weight of a piecewise linear
network, the tensor's block of the Hessian is that of the Gauss-Newton matrix (the second derivatives of z in it vanish).
With `diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ` its trace is a sum of squares over targets t and classes c,

    tr H_b = Σ_t m_t Σ_c p_tc ‖J_{t,b}ᵀ (e_c − p_t)‖² / Σ_t count_t

(Ibayashi et al. 2021). A layer that acts on one vector per row, `y = W a + b`, has `‖∂W‖² = ‖∂y‖² ‖a‖²` (Goodfellow 2015),
so that C backward passes of whole batches give it; all other tensors take the gradient of every row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoflat.core.errors import DataError, UnsupportedModel, UsageError
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.rows import MEMORY, Output, per_row
from isoflat.curvature.sweeps import Directions, Sweeps, check_softmax, classes, pulled
from isoflat.risk.batches import pieces
from isoflat.risk.empirical import EmpiricalRisk, Part
from isoflat.risk.network import exactly
from isoflat.risk.routes.output import output_of

LINEAR = 1e-8
"""Largest second derivative of the output along a direction in a tensor, in units of the first, in float64."""

ROWS = 64
"""Rows on which that is looked at."""


def block_traces(
    risk: EmpiricalRisk, state: State, names: Sequence[str] | None = None, memory: int = MEMORY
) -> dict[str, float]:
    """Trace of the Hessian's block of each tensor, exact up to rounding.

    Costs about as many gradient passes as there are classes, times the positions of a row where it has several.

    Args:
        risk: the empirical risk, with softmax cross-entropy.
        state: the point.
        names: trainable tensors; None for all.
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
    check_softmax(risk, state)
    with exactly(state.device):
        check_linear(risk, state.to(dtype=torch.float64), names)

        def per_batch(index: int, batch: Any) -> Part:
            sweeps = Sweeps.record(risk, state, batch)
            found = _through_layers(sweeps, names, classes(risk.loss))
            rest = [name for name in names if name not in found]
            if rest:
                found |= dict(zip(rest, _row_by_row(risk, state, batch, rest, memory), strict=True))
            return Part(torch.stack([found[name] for name in names]), sweeps.count)

        like = torch.zeros(len(names), dtype=torch.int8, device=state.device)
        traces = risk.accumulate(per_batch, like)
    return dict(zip(names, traces.tolist(), strict=True))


def _through_layers(sweeps: Sweeps, names: Sequence[str], along: Directions) -> dict[str, Tensor]:
    """Summed traces of the named tensors that belong to a linear layer: `‖∂y‖² ‖a‖²` and `‖∂y‖²`."""
    layers = sweeps.layers(names)
    zero = torch.zeros((), dtype=torch.float64, device=sweeps.z.device)
    found = {name: zero.clone() for layer in layers for name in layer.own}
    sizes = [layer.inputs.double().square().sum(1) for layer in layers]
    for parts in sweeps.backward(layers, along):
        for layer, size, part in zip(layers, sizes, parts, strict=True):
            if part is None:
                continue
            rows = part.double().square().sum(1)
            if layer.weight in layer.own:
                found[layer.weight] += rows @ size
            if layer.bias in layer.own:
                found[layer.bias] += rows.sum()
    return found


def _row_by_row(risk: EmpiricalRisk, state: State, batch: Any, names: list[str], memory: int) -> Tensor:
    """Summed traces of tensors of any kind, from the gradient of each row: shape `(number of names,)`, float64."""

    def squares(output: Output, tensors: dict[str, Tensor], target: Tensor) -> Tensor:
        total = torch.zeros(len(names), dtype=torch.float64, device=state.device)
        for parts in pulled(classes(risk.loss), output, tensors, target):
            total = total + torch.stack([parts[name].double().square().sum() for name in names])
        return total

    # The gradients, their squares, and what the sweep itself holds.
    each = sum(state.parameters[name].numel() for name in names) * (2 * 8 + state.dtype.itemsize)
    parts = (per_row(risk, state, piece, names, squares) for piece in pieces(batch, max(1, memory // max(each, 1))))
    return torch.stack([part.sum(0) for part in parts]).sum(0)


def check_linear(risk: EmpiricalRisk, state: State, names: Sequence[str]) -> None:
    """Whether the output of a few rows is linear in each tensor by itself.

    Raises:
        UnsupportedModel: it is not.
    """
    batch = next(iter(risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    few = next(pieces(batch, ROWS))
    bent = []
    for name in names:
        tensor = state.parameters[name]
        drawn = torch.randn(tensor.shape, generator=stream(0, "linear", name), dtype=torch.float64).to(state.device)
        direction = drawn * ((norm(tensor) or 1.0) / (norm(drawn) or 1.0))
        step = torch.zeros((), dtype=torch.float64, device=state.device, requires_grad=True)
        first = _derivative(output_of(risk.term(state.replace({name: tensor + step * direction}), few)), step)
        second = _derivative(first, step)
        if norm(second.detach()) > LINEAR * norm(first.detach()):
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
