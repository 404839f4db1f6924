"""Rescalings that keep a network's function: what they do to a flatness number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.estimate import Estimate
from isoflat.core.record import Record
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.measures.run import measure_all
from isoflat.risk.network import Network
from isoflat.symmetry.base import verify
from isoflat.symmetry.scaling import LayerScale

PAPER, PLAIN = "quotient_spectral_norm", "hessian_spectral_norm"


@final
@dataclass(frozen=True)
class Rung:
    """The network rescaled by one factor.

    Attributes:
        factor: how strongly.
        output_change: largest change of an output on the training set, relative to the largest output.
        paper: the paper's number there.
        plain: the plain Hessian's norm there.
        paper_change: relative to the first rung.
        plain_change: relative to the first rung.
    """

    factor: float
    output_change: float
    paper: Record
    plain: Record
    paper_change: float
    plain_change: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {**vars(self), "paper": self.paper.to_dict(), "plain": self.plain.to_dict()}


@final
@dataclass(frozen=True)
class Attack:
    """Two ladders of rescalings of one network, measured in float64.

    Attributes:
        label: which network.
        verified: worst output change over random layer-wise rescalings; the chain was proved before it was used.
        layers: first layer times the factor, last layer divided by it.
        units: each unit of the first hidden layer times the factor or divided by it, at random, and the next
            layer's columns inversely; a negative control.
    """

    label: str
    verified: float
    layers: tuple[Rung, ...]
    units: tuple[Rung, ...]

    @property
    def records(self) -> tuple[Record, ...]:
        """Every measured number."""
        return tuple(record for rung in (*self.layers, *self.units) for record in (rung.paper, rung.plain))

    @property
    def sentences(self) -> tuple[str, str]:
        """What the rescalings did, in words."""
        last, control = self.layers[-1], self.units[-1]
        return (
            f"Rescaling whole layers of one network ({self.label}) by {last.factor:g} changes its outputs by at most "
            f"{last.output_change:.0e} of their size, the plain Hessian norm from {self._span(self.layers, 'plain')}, "
            f"and the paper's number by {last.paper_change:.0e} of its value.",
            f"Not covered: rescaling single units by {control.factor:g} keeps the outputs too (to "
            f"{control.output_change:.0e}) but moves the paper's number from {self._span(self.units, 'paper')}; "
            "a later version's geometry 'auto' is meant to close this.",
        )

    @staticmethod
    def _span(rungs: Sequence[Rung], number: str) -> str:
        first, last = (getattr(rung, number).estimate.value for rung in (rungs[0], rungs[-1]))
        return f"{first:.3g} to {last:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "label": self.label,
            "verified": self.verified,
            "layers": [rung.to_dict() for rung in self.layers],
            "units": [rung.to_dict() for rung in self.units],
            "sentences": list(self.sentences),
        }


def attack(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    label: str,
    factors: Sequence[float],
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> Attack:
    """Rescale copies of a feed-forward network without biases and measure them; the model itself is not changed.

    Args:
        model: a chain of linear layers and positively homogeneous activations.
        data: inputs and class targets.
        label: what to call the network.
        factors: rescalings to try, the first one being the reference, usually 1.
        seed: of the start vectors and of which units grow.
        report: told what is going on, once per rescaled network.

    Raises:
        SymmetryViolated: rescaling whole layers changes this network's outputs.
    """
    twin = copy.deepcopy(model).double()
    precise = (data[0].double(), data[1])
    network = Network(twin)
    state = network.state().to(dtype=torch.float64)

    def outputs(at: State) -> Tensor:
        with torch.no_grad():
            return network(at, lambda module: module(precise[0]))

    chain = LayerScale.sequential(state)
    verified = verify(chain, outputs, state, stream(seed, "verify"))
    inside = [1.0] * (chain.dimension - 1)
    signs = _signs(state, chain, seed)
    moves = {
        "layers": lambda factor: chain.act(state, chain.element(factor, *inside, 1 / factor)),
        "units": lambda factor: scale_units(state, chain, factor**signs),
    }
    ladders: dict[str, list[Rung]] = {name: [] for name in moves}
    for name, move in moves.items():
        for factor in factors:
            rung_label = f"{label}, {name} × {factor:g}"
            report(f"attacking {rung_label}")
            moved = move(factor)
            records = _measured(twin, moved, precise, rung_label, seed)
            change = outputs(moved) - outputs(state)
            ladders[name].append(_rung(factor, change, outputs(state), records, ladders[name]))
    return Attack(label, verified, tuple(ladders["layers"]), tuple(ladders["units"]))


def scale_units(state: State, chain: LayerScale, factors: Tensor) -> State:
    """Multiply each unit of the first hidden layer by its own factor, and divide the next layer's column by it.

    Args:
        state: the point.
        chain: names the layers.
        factors: positive, one per unit.
    """
    first, second = chain.weights[:2]
    scaled = {first: state.tensors[first] * factors[:, None], second: state.tensors[second] / factors}
    if (bias := chain.biases[0]) is not None:
        scaled[bias] = state.tensors[bias] * factors
    return state.replace(scaled)


def _signs(state: State, chain: LayerScale, seed: int) -> Tensor:
    """+1 for units that grow, −1 for those that shrink, as equally many as possible."""
    units = state.tensors[chain.weights[0]].shape[0]
    order = torch.randperm(units, generator=stream(seed, "units"))
    return torch.where(order < units / 2, 1.0, -1.0).double()


def _measured(
    twin: nn.Module, state: State, data: tuple[Tensor, Tensor], label: str, seed: int
) -> tuple[Record, Record]:
    """Both numbers of a copy of the network that holds the state's tensors."""
    holder = copy.deepcopy(twin)
    holder.load_state_dict(state.tensors)
    table = measure_all(
        holder, data, nn.CrossEntropyLoss(), measures=[PAPER, PLAIN], geometry="layerwise", seed=seed, label=label
    )
    return table[PAPER], table[PLAIN]


def _rung(factor: float, change: Tensor, before: Tensor, records: tuple[Record, Record], earlier: list[Rung]) -> Rung:
    paper, plain = records
    start = earlier[0] if earlier else None
    return Rung(
        factor=factor,
        output_change=float(change.abs().max() / before.abs().max()),
        paper=paper,
        plain=plain,
        paper_change=_relative(paper.estimate, start.paper.estimate) if start else 0.0,
        plain_change=_relative(plain.estimate, start.plain.estimate) if start else 0.0,
    )


def _relative(after: Estimate, before: Estimate) -> float:
    return abs(after.value / before.value - 1)
