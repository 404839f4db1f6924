"""Second moments of gradients as operators: with labels that the model draws, and with those of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.state import State
from isoflat.core.streams import stream
from isoflat.curvature.through_output import Middle, ThroughOutput
from isoflat.risk.batches import move
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.likelihood import likelihood
from isoflat.risk.losses import TargetLoss, split
from isoflat.risk.network import exactly
from isoflat.risk.routes.output import OutputGraph, check_output, output_of

_CELLS = 1 << 52
"""Uniform numbers are the middles of so many cells: exact in float64, and neither 0 nor 1."""


@final
@dataclass(frozen=True)
class SampledFisher(ThroughOutput):
    """`F̃ = Σ_t J_tᵀ r̃_t r̃_tᵀ J_t / Σ_t count_t` over targets t, with r̃ at labels drawn from the model's prediction.

    Martens 2020, section 9.2. Its expectation over the labels is the Gauss-Newton matrix (`risk.likelihood`). Each
    target draws its own label, so every position of a sequence, or entry of an output under squared error, adds a term
    of rank one. Build it with `sampled_fisher`.

    Attributes:
        labels: what each batch's targets drew, one row for each draw; the same at every product and in every precision.
    """

    labels: tuple[Tensor, ...] = field(repr=False)

    def middle(self, graph: OutputGraph, index: int) -> Middle:
        """Mean over the draws of `r̃ ⟨r̃, u⟩`, target by target."""
        model = likelihood(self.risk.loss, graph.z, graph.target)
        residuals = [model.residual(graph.z, labels.to(self.device)) for labels in self.labels[index]]

        def mean(tangent: Tensor) -> Tensor:
            total = torch.zeros_like(tangent)
            for residual in residuals:
                total += model.outer(residual, tangent)
            return total / len(residuals)

        return mean


@final
@dataclass(frozen=True)
class EmpiricalFisher(ThroughOutput):
    """`C = Σ_i (c_i / Σc) ∇ℓ_i ∇ℓ_iᵀ` over rows i of the data: the uncentred second moment of their gradients.

    `ℓ_i = total_i / c_i` is the row's own loss, the mean over its c_i counted targets (all positions of a sequence, all
    entries of an output), so that `L = Σ_i (c_i / Σc) ℓ_i`. With one target to a row this is `(1/N) Σ g_i g_iᵀ`; a class
    weight counts as so many copies of a row. Where the loss is a sum over the data it is `Σ_i g_i g_iᵀ`. Rows whose
    model computes its own loss count as one each. It is no Fisher matrix (Kunstner, Balles and Hennig 2019). Build it
    with `empirical_fisher`.

    Attributes:
        counts: c, for each batch of this process.
    """

    counts: tuple[Tensor | None, ...] = field(repr=False)

    def middle(self, graph: OutputGraph, index: int) -> Middle:
        """`r_i ⟨r_i, u_i⟩ / c_i`, row by row."""
        counts: Any = self.counts[index]
        residual = graph.residual.detach().flatten(1)
        # A row without counted targets has no gradient either.
        share = torch.where(counts > 0, 1 / counts, 0).to(residual)[:, None]

        def outer(tangent: Tensor) -> Tensor:
            inner = (residual * tangent.flatten(1)).sum(1, keepdim=True)
            return (residual * (inner * share)).view_as(tangent)

        return outer


def sampled_fisher(risk: EmpiricalRisk, state: State, seed: int, draws: int = 1) -> SampledFisher:
    """The Fisher matrix with labels drawn once, in one forward pass; `.keep()` holds its graphs in memory.

    Every draw has one stream of uniform numbers, named by seed and draw, that runs on through the targets in the order
    of the data: where batches are cut changes no label. Ignored targets pass their number over and add nothing.

    Args:
        risk: the empirical risk, with softmax cross-entropy, binary cross-entropy with logits, or squared error.
        state: the point.
        seed: any integer.
        draws: labels for each target.

    Raises:
        DataError: there is no data.
        UsageError: labels cannot be drawn from the loss, or weights enter it other than through the model's output.

    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(torch.nn.Linear(1, 2, bias=False))
    >>> data = as_batches((torch.ones(1, 1), torch.tensor([0])))
    >>> risk = EmpiricalRisk(network, as_loss(torch.nn.CrossEntropyLoss()), data)
    >>> state = network.state().replace({"weight": torch.zeros(2, 1)})
    >>> sampled_fisher(risk, state, seed=0).matvec(torch.tensor([1.0, 0.0])).tolist()
    [0.25, -0.25]
    """
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    check_output(risk, state)
    streams = [stream(seed, "labels", draw) for draw in range(draws)]
    with exactly(state.device), torch.no_grad():
        labels = tuple(_draw(risk, state, batch, streams) for batch in risk.batches)
    return SampledFisher(risk, state, labels)


def empirical_fisher(risk: EmpiricalRisk, state: State) -> EmpiricalFisher:
    """The second moment of the rows' gradients at a state; `.keep()` holds its graphs in memory.

    One forward pass counts each row's targets.

    Raises:
        DataError: there is no data.
        UsageError: weights enter the loss other than through the model's output, or the output is not known or does
            not have the rows of the data along its first dimension.

    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(torch.nn.Linear(1, 1, bias=False))
    >>> data = as_batches((torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [2.0]])))
    >>> risk = EmpiricalRisk(network, as_loss(torch.nn.MSELoss()), data)
    >>> state = network.state().replace({"weight": torch.zeros(1, 1)})
    >>> empirical_fisher(risk, state).matvec(torch.tensor([1.0])).tolist()
    [10.0]
    """
    check_output(risk, state)
    with exactly(state.device), torch.no_grad():
        counts = tuple(risk.own(lambda index, batch: _row_counts(risk, state, batch)))
    return EmpiricalFisher(risk, state, counts)


def _row_counts(risk: EmpiricalRisk, state: State, batch: Any) -> Tensor:
    """Counted targets of each row of a batch, or their weights, float64; ones where the loss is a sum."""
    loss, term = risk.loss, risk.term(state, batch)
    z = output_of(term)
    rows = len(z) if z.ndim else 0
    if rows != term.rows:
        raise UsageError(
            f"the output's shape {tuple(z.shape)} does not begin with the batch's {term.rows} rows, so there is no "
            "gradient of each row: return outputs with the rows along dimension 0"
        )
    if not isinstance(loss, TargetLoss) or not loss.averages:
        return torch.ones(rows, dtype=torch.float64)
    target = _target(risk, state, batch)
    return torch.tensor([loss.count(z[i : i + 1], target[i : i + 1]) for i in range(rows)], dtype=torch.float64)


def _draw(risk: EmpiricalRisk, state: State, batch: Any, streams: list[torch.Generator]) -> Tensor:
    """Labels of one batch, one row for each stream, on the CPU."""
    z = output_of(risk.term(state, batch))
    model = likelihood(risk.loss, z, _target(risk, state, batch))
    drawn = []
    for generator in streams:
        cells = torch.randint(_CELLS, model.mass.shape, generator=generator)
        drawn.append(model.draw(z, ((cells.double() + 0.5) / _CELLS).to(z.device)).cpu())
    return torch.stack(drawn)


def _target(risk: EmpiricalRisk, state: State, batch: Any) -> Any:
    """What the loss compares the output of a batch with; None where the model computes its own loss."""
    return split(move(batch, state.device, state.dtype))[1] if isinstance(risk.loss, TargetLoss) else None
