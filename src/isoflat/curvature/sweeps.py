"""Backward passes of the output along given directions, and the gradients of single rows that follow.

For the Gauss-Newton matrix they are the square roots of the loss's Hessian in the output (`risk.likelihood`). For softmax
cross-entropy there is one for each class: with `diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ` the matrix is a sum of squares
over targets t and classes c, `Σ_t m_t Σ_c p_tc (J_tᵀ (e_c − p_t)) (J_tᵀ (e_c − p_t))ᵀ`. A layer that acts on one vector per
row, `y = W a + b`, has `∂W = ∂y aᵀ` in each row, so that C passes of whole batches tell all about its rows' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.risk.empirical import EmpiricalRisk, leaf_state
from isoflat.risk.likelihood import likelihood
from isoflat.risk.losses import Loss, TargetLoss
from isoflat.risk.network import exactly
from isoflat.risk.ranks import BatchSum
from isoflat.risk.routes.output import check_output, function_of, output_of
from isoflat.risk.rows import Output, check_apart


def check_canonical(risk: EmpiricalRisk, state: State) -> None:
    """Check that the loss's Hessian in the output depends on no target, and has known square roots.

    Raises:
        UsageError: it does, or has none.
    """
    check_output(risk, state)
    batch = next(iter(risk.batches))
    with exactly(state.device), torch.no_grad():
        term = risk.term(state, batch)
        loss = function_of(risk.loss, term)
        model = likelihood(loss, output_of(term), risk.target(state, batch))
    if not model.canonical:
        raise UsageError(
            "the loss's Hessian in the model's output depends on the targets, and may have no square roots: expected softmax "
            "cross-entropy, binary cross-entropy with logits, squared error or a Poisson loss of the scores as they are, "
            "or a sum of such"
        )


def check_softmax(risk: EmpiricalRisk, state: State) -> None:
    """Check that the loss is softmax cross-entropy of the model's output.

    Raises:
        UsageError: it is not, or rows cannot be taken apart.
    """
    check_apart(risk)
    if not (isinstance(risk.loss, TargetLoss) and isinstance(risk.loss.criterion, nn.CrossEntropyLoss)):
        raise UsageError(
            "needs softmax cross-entropy of the scores as they are: torch.nn.CrossEntropyLoss with batches (inputs, targets), "
            "and logits left out"
        )
    check_output(risk, state)


Directions = Callable[[Tensor, Any], Iterator[Tensor]]
"""Tensors of the output's shape, from output and target; each row's is its own."""


@final
@dataclass(frozen=True)
class Layer:
    """A call of a linear layer.

    Attributes:
        weight: name of the weight.
        bias: name that a bias has, whether there is one or not.
        inputs: inputs a, shape `(rows, in)` where it acts on one vector per row, without a graph.
        output: output y, shape `(rows, out)`, with its graph.
        own: those of the two names that act through this call alone.
    """

    weight: str
    bias: str
    inputs: Tensor
    output: Tensor
    own: frozenset[str] = frozenset()


@final
@dataclass(frozen=True)
class Sweeps:
    """One batch's output with its graph, and the layers called on the way.

    Attributes:
        batch: batch of the data.
        leaves: trainable tensors as leaves of the graph.
        calls: calls of linear layers, in turn.
        z: output of the model.
        target: target that the loss compares z with.
        count: number of counted targets, or sum of their weights.
        loss: the loss as a function of z.
    """

    batch: Any
    leaves: Mapping[str, Tensor]
    calls: tuple[Layer, ...]
    z: Tensor
    target: Any
    count: float
    loss: Loss

    @staticmethod
    def record(risk: EmpiricalRisk, state: State, batch: Any) -> Sweeps:
        """One forward pass under watch."""
        calls: list[Layer] = []
        leaves = leaf_state(state)
        with ExitStack() as stack:
            for path, module in risk.network.module.named_modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(_watch(calls, path), with_kwargs=True).remove)
            term = risk.term(leaves, batch)
        z = output_of(term)
        if not z.ndim or len(z) != term.rows:
            raise UsageError(
                f"the output's shape {tuple(z.shape)} does not begin with the batch's {term.rows} rows: return outputs "
                "with the rows along dimension 0 and the classes along dimension 1"
            )
        loss = function_of(risk.loss, term)
        return Sweeps(batch, leaves.parameters, tuple(calls), z, risk.target(state, batch), term.count, loss)

    def layers(self, names: Sequence[str]) -> tuple[Layer, ...]:
        """Layers called once on one vector per row, those that named tensors act through, with the names of these."""
        found = (replace(layer, own=layer.own & set(names)) for layer in self._alone)
        return tuple(layer for layer in found if layer.own)

    def backward(self, layers: Sequence[Layer], along: Directions) -> Iterator[tuple[Tensor | None, ...]]:
        """∂y of each layer, for every direction in turn; None where the output does not depend on it."""
        outputs = [layer.output for layer in layers]
        if not outputs:
            return
        for cotangent in along(self.z.detach(), self.target):
            yield torch.autograd.grad(self.z, outputs, cotangent, retain_graph=True, allow_unused=True)

    @cached_property
    def _alone(self) -> tuple[Layer, ...]:
        """Layers with the names that act through nothing else: gradients along a random cotangent tell."""
        names = [layer.weight for layer in self.calls]
        single = [
            layer
            for layer in self.calls
            if names.count(layer.weight) == 1
            and layer.output.ndim == 2
            and len(layer.output) == len(self.z)
            and layer.output.requires_grad
        ]
        layers = {name: layer for layer in single for name in (layer.weight, layer.bias) if name in self.leaves}
        if not layers:
            return ()
        drawn = torch.randn(self.z.shape, generator=stream(0, "cotangent"), dtype=torch.float64).to(self.z)
        asked = [*(self.leaves[name] for name in layers), *(layer.output for layer in layers.values())]
        found = torch.autograd.grad(self.z, asked, drawn, retain_graph=True, allow_unused=True)
        own = set()
        for (name, layer), whole, part in zip(layers.items(), found, found[len(layers) :], strict=False):
            if whole is None or part is None:
                continue
            made = part.T @ layer.inputs if name == layer.weight else part.sum(0)
            if norm(whole - made) <= 1000 * torch.finfo(whole.dtype).eps * norm(whole):
                own.add(name)
        return tuple(replace(layer, own=frozenset({layer.weight, layer.bias} & own)) for layer in single)


@final
@dataclass(frozen=True)
class Pass:
    """Request for a mean over the data of a function of each batch's output and its graph.

    Attributes:
        part: function that gives a batch's share of the sum, shape `(entries,)`.
        entries: length of that share.
        status: current activity in words, for a progress bar.
    """

    part: Callable[[Sweeps], Tensor]
    entries: int
    status: str = ""


def accumulated(risk: EmpiricalRisk, state: State, passes: Sequence[Pass]) -> list[Tensor]:
    """Means of several passes from a single forward pass over the data: each of shape `(entries,)`, float64."""

    def per_batch(index: int, batch: Any) -> BatchSum:
        sweeps = Sweeps.record(risk, state, batch)
        return BatchSum(torch.cat([wanted.part(sweeps).double() for wanted in passes]), sweeps.count)

    sizes = [wanted.entries for wanted in passes]
    with exactly(state.device):
        like = torch.zeros(sum(sizes), dtype=torch.int8, device=state.device)
        return list(risk.accumulate(per_batch, like).split(sizes))


def _watch(calls: list[Layer], path: str) -> Any:
    prefix = f"{path}." if path else ""

    def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        given = (args[0] if args else named["input"]).detach()
        calls.append(Layer(f"{prefix}weight", f"{prefix}bias", given, output))

    return hook


def factors(loss: Loss) -> Directions:
    """Square roots of the Hessian of a canonical loss in the output (`risk.likelihood`)."""
    return lambda z, target: likelihood(loss, z, target).factors(z)


def residual(loss: Loss) -> Directions:
    """The gradient of the loss in the output: a single direction."""

    def along(z: Tensor, target: Any) -> Iterator[Tensor]:
        assert isinstance(loss, TargetLoss)  # rows have losses of their own
        yield torch.func.grad(lambda output: loss.summed(output, target))(z)

    return along


def pulled(
    along: Directions, output: Output, tensors: dict[str, Tensor], target: Tensor
) -> Iterator[dict[str, Tensor]]:
    """`Jᵀ` of a single row on every direction in turn, by tensor.

    Args:
        along: directions.
        output: output of the row (`risk.rows`).
        tensors: tensors that it is a function of.
        target: target of the row, with a leading dimension.
    """
    z, pull = torch.func.vjp(output, tensors)  # pyrefly: ignore
    for cotangent in along(z, target):
        yield pull(cotangent)[0]
