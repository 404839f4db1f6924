"""The model's output as a function of the weights, and products with its Jacobian from both sides.

Both are reverse passes. `g(u) = Jᵀ u` is linear in u, so `J v = ∂⟨g(u), v⟩/∂u`; the graph of g depends on neither u nor
v, and is kept beside the output's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from isoflat.core.errors import DataError, UsageError
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, differentiate, leaf_state
from isoflat.risk.losses import Loss, PerBatchLoss, TargetLoss, Term
from isoflat.risk.network import exactly
from isoflat.risk.routes.base import joined
from isoflat.risk.second_order import Trace


@final
@dataclass(frozen=True)
class OutputGraph:
    """One batch's output `z(θ)` with its graph, `J = ∂z/∂θ`.

    Attributes:
        leaves: trainable tensors as leaves of the graph.
        z: output of the model, of any shape.
        residual: derivative `r = ∂total/∂z`, with its graph over z.
        seed: vector u of `g(u) = Jᵀ u`.
        pulled: nodes of the graph that `g(u)` hangs on; None for tensors that z does not depend on.
        count: number of counted targets, or sum of their weights.
        rules: names of the second-order rules that were applied.
        target: target that the loss compares z with; None where the model computes its own loss.
        loss: the loss as a function of z; the risk's own where that is not known.
    """

    leaves: tuple[Tensor, ...]
    z: Tensor
    residual: Tensor
    seed: Tensor
    pulled: tuple[GradientEdge | None, ...]
    count: float
    rules: frozenset[str]
    target: Any
    loss: Loss

    @staticmethod
    def build(risk: EmpiricalRisk, state: State, batch: Any) -> OutputGraph:
        """One forward pass and the two backward graphs.

        Raises:
            UsageError: the loss does not say what the model's output is.
        """
        leaves = leaf_state(state)
        with Trace() as trace:
            term = risk.term(leaves, batch)
        z = output_of(term)
        parameters = list(leaves.parameters.values())
        residual = differentiate(term.total, [z], keep=True)[0] if z.requires_grad else None
        seed = torch.zeros_like(z, requires_grad=True)
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if z.requires_grad:
            with trace.jacobian():
                gradients = torch.autograd.grad(z, parameters, seed, create_graph=True, allow_unused=True)
        pulled = tuple(
            get_gradient_edge(gradient) if gradient is not None and gradient.requires_grad else None
            for gradient in gradients
        )
        target = risk.target(state, batch)
        residual = torch.zeros_like(z) if residual is None else residual
        rules = frozenset(trace.used)
        loss = function_of(risk.loss, term)
        return OutputGraph(tuple(parameters), z, residual, seed, pulled, term.count, rules, target, loss)

    def push(self, vector: Sequence[Tensor]) -> Tensor:
        """`J v` for v given tensor by tensor: the shape of z."""
        moved = [(edge, part) for edge, part in zip(self.pulled, vector, strict=True) if edge is not None]
        if not moved:
            return torch.zeros_like(self.z)
        edges, parts = zip(*moved, strict=True)
        return torch.autograd.grad(edges, self.seed, parts, retain_graph=True)[0]

    def pull(self, cotangent: Tensor) -> Tensor:
        """`Jᵀ w` for w of the shape of z: shape `(n,)`."""
        found: Sequence[Tensor | None] = [None] * len(self.leaves)
        if self.z.requires_grad:
            found = torch.autograd.grad(self.z, self.leaves, cotangent, retain_graph=True, allow_unused=True)
        return joined(self.leaves, found)

    def curve(self, tangent: Tensor) -> Tensor:
        """`(∂²total/∂z²) u`: the shape of z. Zero where the loss is linear in z."""
        if not self.residual.requires_grad:
            return torch.zeros_like(self.z)
        found = torch.autograd.grad(self.residual, self.z, tangent, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.z) if found is None else found


def output_of(term: Term) -> Tensor:
    """The model's output, of which the loss is a function.

    Raises:
        UsageError: the loss does not say what it is.
    """
    if term.z is None:
        raise UsageError(
            "the loss does not say what the model's output is, so there is no Gauss-Newton or Fisher matrix: pass a "
            "torch.nn criterion or a function of output and target, or let the model's output carry `.logits` beside "
            "its `.loss`"
        )
    return term.z


def function_of(loss: Loss, term: Term) -> Loss:
    """A loss as a function of the output in its term, where that is of several tensors that were packed into one."""
    inside = term.loss
    if inside is None or inside.whole:
        return loss
    packed = (isinstance(loss, TargetLoss) and loss.whole) or isinstance(loss, PerBatchLoss)
    return inside if packed else loss


def check_output(risk: EmpiricalRisk, state: State) -> None:
    """Check that the weights enter the loss of the first batch only through the model's output.

    The gradient that remains when nothing flows back through the output must be zero, exactly.

    Raises:
        DataError: there is no data.
        UsageError: it is not zero, or the loss does not say what the output is.
    """
    batch = next(iter(risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    with exactly(state.device):
        leaves = leaf_state(state)
        term = risk.term(leaves, batch)
        z = output_of(term)
        if z.requires_grad:
            z.register_hook(torch.zeros_like)
        beside = differentiate(term.total, list(leaves.parameters.values()))
    names = [
        name
        for name, gradient in zip(state.parameters, beside, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    ]
    if names:
        raise UsageError(
            f"the loss depends on {', '.join(names[:5])} other than through the model's output (a penalty on weights, "
            "or logits that are not those the loss was computed from), so it has no Gauss-Newton or Fisher matrix. "
            "Take the penalty out of the loss, or return the logits that enter it"
        )
