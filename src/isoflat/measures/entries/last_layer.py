"""The last layer under softmax cross-entropy: all of its curvature from features and probabilities, without a derivative.

With `z = W φ (+ b)` and probabilities p the Hessian's block of rows s and s' of W is `E[(δ_ss' p_s − p_s p_s') φ φᵀ]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.sweeps import Layer, Pass, Sweeps, check_softmax
from isoflat.geometry.base import Invariance
from isoflat.measures.base import DataStatistic, Findings, Question
from isoflat.measures.point import EvaluationPoint
from isoflat.risk.likelihood import likelihood
from isoflat.risk.likelihood.records import probabilities, spread
from isoflat.risk.losses import TargetLoss
from isoflat.risk.network import exactly

MEMORY = 1 << 30
"""Bytes that the Gram matrices of all classes may take."""


@final
@dataclass(frozen=True)
class Head:
    """The layer that gives the scores.

    Attributes:
        name: name of its weight.
        weight: W, shape `(classes, features)`, float64, times what scores are multiplied by, and its columns times the
            features' deviations if these are normalised.
        scale: divisors of the features, shape `(features,)`, float64: ones if they are not normalised, infinite for
            those that never change.
        notes: remarks that go with every number of this layer.
    """

    name: str
    weight: Tensor
    scale: Tensor
    notes: tuple[str, ...]


@final
@dataclass(frozen=True)
class LastLayer(DataStatistic):
    """The layer that gives the scores, found by running the first batch.

    Attributes:
        normalised: whether each feature is divided by its deviation over the data, and W multiplied by it.
    """

    normalised: bool
    framed = False

    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The layer as it is, where its features are to be normalised."""
        return (LastLayer(normalised=False),) if self.normalised else ()

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass | None:
        """One forward pass where features are normalised."""
        return _moments(point, found[0].weight.shape[1]) if found else None

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> Head:
        """The layer, seen in the first batch; its columns times the deviations of the features where these are known."""
        if total is None:
            return _first_seen(point)
        name, weight = found[0].name, found[0].weight
        deviation = _deviations(point, total)
        still = deviation == 0
        notes = (
            [f"{int(still.sum())} features never change and, like biases, are left out"] if bool(still.any()) else []
        )
        return Head(name, weight * deviation, torch.where(still, math.inf, deviation), tuple(notes))


@dataclass(frozen=True)
class LastLayerStatistic(DataStatistic):
    """Statistic of the last layer, from its features and the network's probabilities.

    Attributes:
        normalised: whether features are normalised, as for `LastLayer`.
    """

    normalised: bool
    framed = False

    @final
    def requires(self, point: EvaluationPoint) -> tuple[Question, ...]:
        """The layer that gives the scores."""
        return (LastLayer(self.normalised),)


@final
@dataclass(frozen=True)
class LastTrace(LastLayerStatistic):
    """`Σ_ss' ⟨w_s, w_s'⟩ tr H_ss'` of the last layer: `E[(Σ_s p_s ‖w_s‖² − ‖Σ_s p_s w_s‖²) ‖φ‖²]`."""

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass:
        """One forward pass."""
        head: Head = found[0]

        def part(z: Tensor, features: Tensor) -> Tensor:
            return (spread(z.softmax(1), head.weight) * features.square().sum(1)).sum().reshape(1)

        return _mean(point, head, part, 1)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, Head]:
        """The sum, and the layer."""
        assert total is not None
        return float(total), found[0]


@final
@dataclass(frozen=True)
class LastBlocks(LastLayerStatistic):
    """`Σ_s ‖w_s‖² λ_max(H_ss)` of the last layer, with `H_ss = E[p_s (1 − p_s) φ φᵀ]`."""

    def sweep(self, point: EvaluationPoint, *found: Any) -> Pass:
        """One forward pass, in which a matrix for each class is summed."""
        head: Head = found[0]
        classes, size = head.weight.shape
        if classes * size * size * 8 > MEMORY:
            raise UsageError(
                f"relative_flatness_max holds {classes} matrices of {size}×{size} entries, more than {MEMORY >> 30} GiB: "
                "relative_flatness takes none"
            )

        def part(z: Tensor, features: Tensor) -> Tensor:
            p, others = probabilities(z)
            # The matrix products are the cost, and are made as those of the network are; sums over batches are float64.
            shares, rows = (p * others).to(point.state.dtype), features.to(point.state.dtype)
            return torch.stack([rows.T @ (rows * share[:, None]) for share in shares.T]).reshape(-1)

        return _mean(point, head, part, classes * size * size)

    def finish(self, point: EvaluationPoint, total: Tensor | None, *found: Any) -> tuple[float, Head]:
        """An eigenvalue problem for each class, and the layer."""
        assert total is not None
        head: Head = found[0]
        classes, size = head.weight.shape
        blocks = total.view(classes, size, size)
        tops = torch.linalg.eigvalsh(blocks)[:, -1]
        return float(head.weight.square().sum(1) @ tops), head


def _first_seen(point: EvaluationPoint) -> Head:
    """The layer that gives the scores of the first batch.

    Raises:
        UsageError: there is none, it is held fixed, or the loss is not softmax cross-entropy of the scores.
    """
    risk, state = point.risk, point.state
    check_softmax(risk, state)
    with exactly(state.device), torch.no_grad():
        name = last_of(point, Sweeps.record(risk, state, next(iter(risk.batches)))).weight
    weight = state.parameters.get(name)
    if weight is None:
        raise UsageError(f"the last layer's {name} is held fixed: nothing is measured there")
    weight, scale = gain(point) * weight.detach().double(), torch.ones(weight.shape[1], dtype=torch.float64)
    return Head(name, weight, scale.to(weight.device), ())


def _mean(point: EvaluationPoint, head: Head, part: Callable[[Tensor, Tensor], Tensor], entries: int) -> Pass:
    """Pass that averages `part(scores, features)` over the data, with the weights that the loss gives examples."""

    def of_batch(sweeps: Sweeps) -> Tensor:
        features, z = last_of(point, sweeps).inputs.double(), sweeps.z.detach()
        mass = likelihood(point.risk.loss, z, sweeps.target).mass.double()
        return part(z.double(), features / head.scale * mass.sqrt()[:, None])

    return Pass(of_batch, entries, "last layer")


def _moments(point: EvaluationPoint, width: int) -> Pass:
    """First and second moments of the features, and how many rows there are."""

    def of_batch(sweeps: Sweeps) -> Tensor:
        wide = last_of(point, sweeps).inputs.double()
        return torch.cat([wide.sum(0), wide.square().sum(0), wide.new_full((1,), len(wide))])

    return Pass(of_batch, 2 * width + 1)


def _deviations(point: EvaluationPoint, moments: Tensor) -> Tensor:
    """Standard deviation of each feature over the rows of the data, whatever the loss divides by."""
    mean, square = (moments[:-1] / moments[-1]).chunk(2)
    # Below lies the rounding of the features, and of the difference.
    fine = max((10 * torch.finfo(point.state.dtype).eps) ** 2, 100 * torch.finfo(torch.float64).eps)
    variance = square - mean.square()
    return torch.where(variance > fine * square, variance, 0.0).sqrt()


def gain(point: EvaluationPoint) -> float:
    """Factor by which the layer's output is multiplied before the loss.

    Raises:
        UsageError: it is not multiplied by a number.
    """
    loss = point.risk.loss
    found = loss.gain if isinstance(loss, TargetLoss) else 1.0
    if found is None:
        raise UsageError(
            "known in closed form for the scores as a linear layer gives them: leave logits='normalised' out"
        )
    return found


def last_of(point: EvaluationPoint, sweeps: Sweeps) -> Layer:
    """The layer that gives the scores.

    Raises:
        UsageError: the scores are not what a linear layer gives.
    """
    factor, z = gain(point), sweeps.z

    def gives(layer: Layer) -> bool:
        return layer.output is z or (factor != 1 and torch.equal(factor * layer.output, z))

    last = next((layer for layer in reversed(sweeps.calls) if gives(layer)), None)
    if last is None or z.ndim != 2 or last.inputs.ndim != 2:
        raise UsageError(
            "relative flatness is known in closed form where a torch.nn.Linear gives the scores, one row for each "
            f"example; here the output has shape {tuple(z.shape)} and is not what a linear layer returns"
        )
    return last


PITFALLS = (
    "By default each feature is divided by its deviation over the data (normalised=1); without (normalised=0), as the formula "
    "stands, single units move it. Of two public scripts one divides by the variance. The model is not changed."
)


def evaluate(findings: Findings) -> Estimate:
    """Estimate of relative flatness, with a note that names the layer."""
    value, head = findings.answers[0].result
    return Estimate.exact(value, f"relative flatness is that of {head.name}", *head.notes)


def claims(options: Mapping[str, float]) -> frozenset[Invariance]:
    """Claims of both forms of relative flatness: features of any scale only where they are normalised."""
    found = {Invariance.LAYERS, Invariance.NORMS, Invariance.ORDER}
    return frozenset(found | {Invariance.UNITS} if options["normalised"] else found)
