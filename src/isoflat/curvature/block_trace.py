"""Exact traces of the Hessian's diagonal blocks under softmax cross-entropy, without a single Hessian product.

Where the output z is linear in one tensor while the others stand still, as for every weight of a piecewise linear
network, the tensor's block of the Hessian is that of the Gauss-Newton matrix (the second derivatives of z in it vanish).
With `diag(p) − p pᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ` its trace is a sum of squares over targets t and classes c,

    tr H_b = Σ_t m_t Σ_c p_tc ‖J_{t,b}ᵀ (e_c − p_t)‖² / Σ_t count_t

(Ibayashi et al. 2021). A layer that acts on one vector per row, `y = W a + b`, has `‖∂W‖² = ‖∂y‖² ‖a‖²` (Goodfellow 2015),
so that C backward passes of whole batches give it; all other tensors take the gradient of every row by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import DataError, UnsupportedModel, UsageError
from isoflat.core.space import norm
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.risk.batches import move, pieces
from isoflat.risk.empirical import EmpiricalRisk, Part, leaf_state
from isoflat.risk.likelihood import class_axis, likelihood
from isoflat.risk.losses import TargetLoss, call, split
from isoflat.risk.network import exactly
from isoflat.risk.routes.output import check_output, output_of

LINEAR = 1e-8
"""Largest second derivative of the output along a direction in a tensor, in units of the first, in float64."""

ROWS = 64
"""Rows on which that is looked at."""

MEMORY = 1 << 28
"""Bytes that gradients of single rows may take at a time."""


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
    if not (isinstance(risk.loss, TargetLoss) and isinstance(risk.loss.criterion, nn.CrossEntropyLoss)):
        raise UsageError(
            "exact block traces need softmax cross-entropy as torch.nn.CrossEntropyLoss, with batches (inputs, targets): "
            "estimate the traces instead"
        )
    check_output(risk, state)
    with exactly(state.device):
        _check_linear(risk, state.to(dtype=torch.float64), names)

        def per_batch(index: int, batch: Any) -> Part:
            sweeps = _Sweeps.record(risk, state, batch)
            found = sweeps.layers(names)
            rest = [name for name in names if name not in found]
            if rest:
                found |= dict(zip(rest, _row_by_row(risk, state, batch, rest, memory), strict=True))
            return Part(torch.stack([found[name] for name in names]), sweeps.count)

        like = torch.zeros(len(names), dtype=torch.int8, device=state.device)
        traces = risk.accumulate(per_batch, like)
    return dict(zip(names, traces.tolist(), strict=True))


@final
@dataclass(frozen=True)
class _Layer:
    """A linear layer that was called once, on one vector per row."""

    weight: str
    bias: str
    inputs: Tensor
    output: Tensor


@final
@dataclass(frozen=True)
class _Sweeps:
    """One batch's output with its graph, and the layers seen on the way."""

    leaves: Mapping[str, Tensor]
    seen: tuple[_Layer, ...]
    z: Tensor
    mass: Tensor
    count: float

    @staticmethod
    def record(risk: EmpiricalRisk, state: State, batch: Any) -> _Sweeps:
        """One forward pass under watch."""
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        leaves = leaf_state(state)
        with ExitStack() as stack:
            for path, module in risk.network.module.named_modules():
                if type(module) is nn.Linear:
                    calls[path] = []
                    stack.callback(module.register_forward_hook(_watch(calls[path]), with_kwargs=True).remove)
            term = risk.term(leaves, batch)
        z = output_of(term)
        if z.ndim < 2 or len(z) != term.rows:
            raise UsageError(
                f"the output's shape {tuple(z.shape)} does not begin with the batch's {term.rows} rows: return outputs "
                "with the rows along dimension 0 and the classes along dimension 1"
            )
        mass = likelihood(risk.loss, z, risk.target(state, batch)).mass
        seen = []
        for path, made in calls.items():
            prefix = f"{path}." if path else ""
            if len(made) == 1 and made[0][1].ndim == 2 and len(made[0][1]) == term.rows and made[0][1].requires_grad:
                seen.append(_Layer(f"{prefix}weight", f"{prefix}bias", *made[0]))
        return _Sweeps(leaves.parameters, tuple(seen), z, mass, term.count)

    def layers(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Summed traces of the named tensors that belong to a layer, and to nothing else."""
        wanted = self._own(names)
        seen = [layer for layer in self.seen if {layer.weight, layer.bias} & wanted]
        found = {name: torch.zeros((), dtype=torch.float64, device=self.z.device) for name in wanted}
        if not seen:
            return found
        outputs = [layer.output for layer in seen]
        sizes = [layer.inputs.double().square().sum(1) for layer in seen]
        for cotangent in _cotangents(self.z.detach(), self.mass):
            parts = torch.autograd.grad(self.z, outputs, cotangent, retain_graph=True, allow_unused=True)
            for layer, size, part in zip(seen, sizes, parts, strict=True):
                if part is None:
                    continue
                rows = part.double().square().sum(1)
                if layer.weight in wanted:
                    found[layer.weight] += rows @ size
                if layer.bias in wanted:
                    found[layer.bias] += rows.sum()
        return found

    def _own(self, names: Sequence[str]) -> set[str]:
        """Those of the names that act through one seen layer only: gradients along a random cotangent tell."""
        layers = {name: layer for layer in self.seen for name in (layer.weight, layer.bias) if name in names}
        if not layers:
            return set()
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
        return own


def _watch(calls: list[tuple[Tensor, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        calls.append(((args[0] if args else named["input"]).detach(), output))

    return hook


def _cotangents(z: Tensor, mass: Tensor) -> Iterator[Tensor]:
    """`√(m_t p_tc) (e_c − p_t)` for every class c, and every position of a row in turn: shape of z, all rows at once."""
    axis = class_axis(z)
    p = z.softmax(axis)
    for place, c in product(_places(z.shape[axis + 1 :]), range(z.shape[axis])):
        cotangent = torch.zeros_like(z)
        row = (slice(None),) * axis
        cotangent[(*row, slice(None), *place)] = -p[(*row, slice(None), *place)]
        cotangent[(*row, c, *place)] += 1
        here = (mass[(*row, *place)] * p[(*row, c, *place)]).sqrt()
        cotangent[(*row, slice(None), *place)] *= here.unsqueeze(axis)
        yield cotangent


def _places(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, shape))


def _row_by_row(risk: EmpiricalRisk, state: State, batch: Any, names: list[str], memory: int) -> Tensor:
    """Summed traces of tensors of any kind, from the gradient of each row: shape `(number of names,)`, float64."""
    inputs, target = split(move(batch, state.device, state.dtype))
    given: Any = dict(inputs) if isinstance(inputs, Mapping) else inputs
    given = tuple(given) if isinstance(given, list) else given
    chosen = {name: state.parameters[name] for name in names}

    def row(inputs: Any, target: Tensor) -> Tensor:
        def output(tensors: Mapping[str, Tensor]) -> Tensor:
            made = risk.network(state.replace(tensors), lambda model: call(model, _lifted(inputs)))
            return made.squeeze(0)

        z, pull = torch.func.vjp(output, chosen)  # pyrefly: ignore
        mass = likelihood(risk.loss, z[None], target[None]).mass
        squares = torch.zeros(len(names), dtype=torch.float64, device=state.device)
        for cotangent in _cotangents(z[None], mass):
            parts = pull(cotangent[0])[0]
            squares = squares + torch.stack([parts[name].double().square().sum() for name in names])
        return squares

    # The gradients, their squares, and what the sweep itself holds.
    each = sum(tensor.numel() for tensor in chosen.values()) * (2 * 8 + state.parameters[names[0]].element_size())
    chunk = max(1, memory // max(each, 1))
    return torch.func.vmap(row, chunk_size=chunk)(given, target).sum(0)


def _lifted(inputs: Any) -> Any:
    """One row as a batch of one."""
    if isinstance(inputs, Mapping):
        return {key: value[None] for key, value in inputs.items()}
    return tuple(value[None] for value in inputs) if isinstance(inputs, tuple) else inputs[None]


def _check_linear(risk: EmpiricalRisk, state: State, names: Sequence[str]) -> None:
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
