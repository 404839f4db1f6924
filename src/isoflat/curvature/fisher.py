"""Second moments of gradients: with labels that the model draws, and with those of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.curvature.gauss_newton import Middle, ThroughOutput
from isoflat.risk.batches import Beside
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.likelihood import likelihood
from isoflat.risk.losses import Loss, TargetLoss, Term
from isoflat.risk.network import exactly
from isoflat.risk.routes.output import OutputGraph, check_output, function_of, output_of
from isoflat.risk.routes.reverse import Recomputed
from isoflat.risk.rows import check_apart

_CELLS = 1 << 52
"""Uniform numbers are the middles of so many cells: exact in float64, and neither 0 nor 1."""


@final
@dataclass(frozen=True)
class SampledFisher(ThroughOutput):
    """`F̃ = Σ_t J_tᵀ r̃_t r̃_tᵀ J_t / Σ_t count_t` over targets t, with r̃ at labels drawn from the model's prediction.

    Martens 2020, section 9.2. Its expectation over the labels is the Gauss-Newton matrix (`risk.likelihood`). Each
    target draws its own label, so every position of a sequence, or entry of an output under squared error, adds a term
    of rank one. The labels come beside each batch, the draws along the last dimension.
    """

    @classmethod
    def between(cls, risk: EmpiricalRisk, output: OutputGraph, batch: Any) -> Middle:
        """Mean over the draws of `r̃ ⟨r̃, u⟩`, target by target."""
        model = likelihood(output.loss, output.z, output.target)
        residuals = [model.residual(output.z, labels.to(output.z.device)) for labels in batch.column.unbind(-1)]

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
    model computes its own loss count as one each. It is no Fisher matrix (Kunstner, Balles and Hennig 2019). The counts
    come beside each batch.
    """

    @classmethod
    def between(cls, risk: EmpiricalRisk, output: OutputGraph, batch: Any) -> Middle:
        """`r_i ⟨r_i, u_i⟩ / c_i`, row by row."""
        counts = batch.column
        residual = output.residual.detach().reshape(len(output.z), -1)
        # A row without counted targets has no gradient either.
        share = torch.where(counts > 0, 1 / counts, 0).to(residual)[:, None]

        def outer(tangent: Tensor) -> Tensor:
            inner = (residual * tangent.reshape(residual.shape)).sum(1, keepdim=True)
            return (residual * (inner * share)).view_as(tangent)

        return outer


def sampled_fisher(risk: EmpiricalRisk, state: State, seed: int, draws: int = 1) -> Recomputed:
    """Products with the Fisher matrix, labels drawn once, in one forward pass; `.keep()` holds its graphs in memory.

    Every row of the data has a stream of uniform numbers of its own for each draw: neither where batches are cut nor
    which process owns them changes a label. Ignored targets pass their number over and add nothing.

    Args:
        risk: the empirical risk, with a loss whose likelihood is known (`risk.likelihood`).
        state: the point.
        seed: integer that seeds the labels.
        draws: number of labels drawn for each target.

    Raises:
        DataError: there is no data.
        UsageError: labels cannot be drawn from the loss, weights enter it other than through the model's output, or that
            does not have the rows of the data along its first dimension.

    >>> from isoflat.risk.batches import as_batches
    >>> from isoflat.risk.losses import as_loss
    >>> from isoflat.risk.network import Network
    >>> network = Network(torch.nn.Linear(1, 2, bias=False))
    >>> data = as_batches((torch.ones(1, 1), torch.tensor([0])))
    >>> risk = EmpiricalRisk(network, as_loss(torch.nn.CrossEntropyLoss()), data)
    >>> state = network.state().replace({"weight": torch.zeros(2, 1)})
    >>> sampled_fisher(risk, state, seed=0).products(torch.tensor([[1.0], [0.0]])).tolist()
    [[0.25], [-0.25]]
    """
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    check_output(risk, state)
    numbered = replace(risk, batches=risk.batches.numbered())
    with exactly(state.device), torch.no_grad():
        labels = tuple(numbered.own(lambda _, batch: _draw(risk, state, batch, seed, draws)))
    return Recomputed(replace(risk, batches=risk.batches.beside(labels)), state, SampledFisher)


def empirical_fisher(risk: EmpiricalRisk, state: State) -> Recomputed:
    """Products with the second moment of the rows' gradients at a state; `.keep()` holds its graphs in memory.

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
    >>> empirical_fisher(risk, state).products(torch.tensor([[1.0]])).tolist()
    [[10.0]]
    """
    check_apart(risk)
    check_output(risk, state)
    return Recomputed(counted(risk, state), state, EmpiricalFisher)


def counted(risk: EmpiricalRisk, state: State) -> EmpiricalRisk:
    """The risk with the counted targets of each row beside its batches, by one forward pass."""
    with exactly(state.device), torch.no_grad():
        counts = tuple(risk.own(lambda _, batch: counts_of(risk, state, batch)))
    return replace(risk, batches=risk.batches.beside(counts))


def counts_of(risk: EmpiricalRisk, state: State, batch: Any) -> Tensor:
    """Counted targets of each row of a batch, or their weights, float64, by a forward pass."""
    term = risk.term(state, batch)
    return row_counts(function_of(risk.loss, term), _rows_first(term), risk.target(state, batch))


def row_counts(loss: Loss, z: Tensor, target: Any) -> Tensor:
    """Counted targets of each row, or their weights, float64, on the CPU; ones where the loss is a sum."""
    if not isinstance(loss, TargetLoss) or not loss.averages:
        return torch.ones(len(z), dtype=torch.float64)
    return loss.row_counts(z, target)


def _draw(risk: EmpiricalRisk, state: State, batch: Beside, seed: int, draws: int) -> Tensor:
    """Labels of one batch beside the places of its rows, the draws along the last dimension, on the CPU."""
    term = risk.term(state, batch)
    z = _rows_first(term)
    model = likelihood(function_of(risk.loss, term), z, risk.target(state, batch))
    drawn = []
    for draw in range(draws):
        streams = [stream(seed, "labels", draw, place) for place in batch.column.tolist()]
        cells = torch.stack([torch.randint(_CELLS, model.mass.shape[1:], generator=own) for own in streams])
        drawn.append(model.draw(z, ((cells.double() + 0.5) / _CELLS).to(z.device)).cpu())
    return torch.stack(drawn, dim=-1)


def _rows_first(term: Term) -> Tensor:
    """The output, which has a row for each of the data's.

    Raises:
        UsageError: it has not.
    """
    z = output_of(term)
    if not z.ndim or len(z) != term.rows:
        raise UsageError(
            f"the output's shape {tuple(z.shape)} does not begin with the batch's {term.rows} rows, so there is no "
            "gradient of each row: return outputs with the rows along dimension 0"
        )
    return z
