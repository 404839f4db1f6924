"""The last layer under softmax cross-entropy: all of its curvature from features and probabilities, without a derivative.

With `z = W φ (+ b)` and probabilities p the Hessian's block of rows s and s' of W is `E[(δ_ss' p_s − p_s p_s') φ φᵀ]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from isoflat.core.errors import UsageError
from isoflat.core.estimate import Estimate
from isoflat.curvature.sweeps import check_softmax
from isoflat.geometry.base import Invariance
from isoflat.measures.base import Findings, Reading, Scene
from isoflat.risk.likelihood import likelihood
from isoflat.risk.losses import TargetLoss
from isoflat.risk.network import exactly
from isoflat.risk.ranks import Part
from isoflat.risk.routes.output import output_of

MEMORY = 1 << 30
"""Bytes that the Gram matrices of all classes may take."""


@final
@dataclass(frozen=True)
class Head:
    """The layer that gives the scores.

    Attributes:
        name: of its weight.
        weight: W, shape `(classes, features)`, float64, times what scores are multiplied by, and its columns times the
            features' deviations if these are normalised.
        scale: what features are divided by, shape `(features,)`, float64: ones if they are not normalised, infinite for
            those that never change.
        notes: what a reader must know.
    """

    name: str
    weight: Tensor
    scale: Tensor
    notes: tuple[str, ...]


@final
@dataclass(frozen=True)
class LastLayer(Reading):
    """The layer that gives the scores, found by running the first batch.

    Attributes:
        normalised: whether each feature is divided by its deviation over the data, and W multiplied by it.
    """

    normalised: bool
    framed = False

    def answer(self, scene: Scene) -> Head:
        """One forward pass where features are normalised; a batch otherwise."""
        check_softmax(scene.risk, scene.state)
        with exactly(scene.state.device), torch.no_grad():
            name = next(_features(scene, scene.risk.batches, None))[0]
            weight = scene.state.parameters.get(name)
            if weight is None:
                raise UsageError(f"the last layer's {name} is held fixed: nothing is measured there")
            weight, scale = gain(scene) * weight.detach().double(), torch.ones(weight.shape[1], dtype=torch.float64)
            if not self.normalised:
                return Head(name, weight, scale.to(weight.device), ())
            deviation = _deviations(scene, name)
        still = deviation == 0
        notes = (
            [f"{int(still.sum())} features never change and, like biases, are left out"] if bool(still.any()) else []
        )
        return Head(name, weight * deviation, torch.where(still, math.inf, deviation), tuple(notes))


@final
@dataclass(frozen=True)
class LastTrace(Reading):
    """`Σ_ss' ⟨w_s, w_s'⟩ tr H_ss'` of the last layer: `E[(Σ_s p_s ‖w_s‖² − ‖Σ_s p_s w_s‖²) ‖φ‖²]`."""

    normalised: bool
    framed = False

    def answer(self, scene: Scene) -> tuple[float, Head]:
        """One forward pass."""
        head = scene.ask(LastLayer(self.normalised))
        sizes = head.weight.square().sum(1)

        def part(p: Tensor, features: Tensor) -> Tensor:
            spread = p @ sizes - (p @ head.weight).square().sum(1)
            return (spread * features.square().sum(1)).sum().reshape(1)

        return float(_forward(scene, head, part, 1)), head


@final
@dataclass(frozen=True)
class LastBlocks(Reading):
    """`Σ_s ‖w_s‖² λ_max(H_ss)` of the last layer, with `H_ss = E[p_s (1 − p_s) φ φᵀ]`."""

    normalised: bool
    framed = False

    def answer(self, scene: Scene) -> tuple[float, Head]:
        """One forward pass, and an eigenvalue problem for each class."""
        head = scene.ask(LastLayer(self.normalised))
        classes, size = head.weight.shape
        if classes * size * size * 8 > MEMORY:
            raise UsageError(
                f"relative_flatness_max holds {classes} matrices of {size}×{size} entries, more than {MEMORY >> 30} GiB: "
                "relative_flatness takes none"
            )

        def part(p: Tensor, features: Tensor) -> Tensor:
            return torch.stack([features.T @ (features * (q * (1 - q))[:, None]) for q in p.T]).reshape(-1)

        blocks = _forward(scene, head, part, classes * size * size).view(classes, size, size)
        tops = torch.linalg.eigvalsh(blocks)[:, -1]
        return float(head.weight.square().sum(1) @ tops), head


def _forward(scene: Scene, head: Head, part: Any, entries: int) -> Tensor:
    """A mean over the data of something of probabilities and features, as the loss takes it."""
    risk, state = scene.risk, scene.state

    def per_batch(index: int, batch: Any) -> Part:
        with torch.no_grad():
            ((_, z, features, term),) = _features(scene, [batch], head.name)
        mass = likelihood(risk.loss, z, risk.target(state, batch)).mass.double()
        return Part(part(z.double().softmax(1), features.double() / head.scale * mass.sqrt()[:, None]), term.count)

    scene.report("last layer")
    with exactly(state.device):
        return risk.accumulate(per_batch, torch.zeros(entries, dtype=torch.int8, device=state.device))


def features_of(scene: Scene, batch: Any, name: str) -> tuple[Tensor, float]:
    """What goes into the last layer, shape `(rows, features)`, float64, and what a mean of the batch divides by."""
    with torch.no_grad():
        ((_, _, features, term),) = _features(scene, [batch], name)
    return features.double(), term.count


def _deviations(scene: Scene, name: str) -> Tensor:
    """Standard deviation of each feature over the rows of the data."""
    risk, state = scene.risk, scene.state

    def per_batch(index: int, batch: Any) -> Part:
        ((_, z, features, term),) = _features(scene, [batch], name)
        wide = features.double()
        return Part(torch.cat([wide.sum(0), wide.square().sum(0), wide.new_full((1,), len(z))]), term.count)

    width = scene.state.parameters[name].shape[1]
    found = risk.accumulate(per_batch, torch.zeros(2 * width + 1, dtype=torch.int8, device=state.device))
    # Over rows, whatever the loss divides by.
    mean, square = (found[:-1] / found[-1]).split(width)
    # Below lies the rounding of the features, and of the difference.
    fine = max((10 * torch.finfo(state.dtype).eps) ** 2, 100 * torch.finfo(torch.float64).eps)
    variance = square - mean.square()
    return torch.where(variance > fine * square, variance, 0.0).sqrt()


def gain(scene: Scene) -> float:
    """What the layer's output is multiplied by before the loss.

    Raises:
        UsageError: it is not multiplied by a number.
    """
    loss = scene.risk.loss
    found = loss.gain if isinstance(loss, TargetLoss) else 1.0
    if found is None:
        raise UsageError(
            "known in closed form for the scores as a linear layer gives them: leave logits='normalised' out"
        )
    return found


def _features(scene: Scene, batches: Any, name: str | None) -> Iterator[tuple[str, Tensor, Tensor, Any]]:
    """Name of the last layer's weight, scores, what goes into the layer, and the term of each batch.

    Raises:
        UsageError: the scores are not what a linear layer gives.
    """
    risk = scene.risk
    for batch in batches:
        calls: list[tuple[str, Tensor, Tensor]] = []
        with ExitStack() as stack:
            for path, module in risk.network.module.named_modules():
                own = f"{path}.weight" if path else "weight"
                if isinstance(module, nn.Linear) and name in (None, own):
                    stack.callback(module.register_forward_hook(_watch(calls, own)).remove)
            term = risk.term(scene.state, batch)
        z = output_of(term)
        factor = gain(scene)
        last = next((c for c in reversed(calls) if c[2] is z or (factor != 1 and torch.equal(factor * c[2], z))), None)
        if last is None or z.ndim != 2 or last[1].ndim != 2:
            raise UsageError(
                "relative flatness is known in closed form where a torch.nn.Linear gives the scores, one row for each "
                f"example; here the output has shape {tuple(z.shape)} and is not what a linear layer returns"
            )
        yield last[0], z, last[1], term


def _watch(calls: list[tuple[str, Tensor, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((name, args[0], output))

    return hook


PITFALLS = (
    "By default each feature is divided by its deviation over the data (normalised=1); without (normalised=0), as the formula "
    "stands, single units move it. Of two public scripts one divides by the variance. The model is not changed."
)


def evaluate(findings: Findings) -> Estimate:
    """The value, and of which layer."""
    value, head = findings.answers[0].result
    return Estimate.exact(value, f"relative flatness is that of {head.name}", *head.notes)


def claims(options: Mapping[str, float]) -> frozenset[Invariance]:
    """Of both forms of relative flatness: features of any scale only where they are normalised."""
    found = {Invariance.LAYERS, Invariance.NORMS, Invariance.ORDER}
    return frozenset(found | {Invariance.UNITS} if options["normalised"] else found)
