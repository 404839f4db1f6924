"""From what a user has to a `Subject`: everything that can be refused is refused here, before any cost."""

from __future__ import annotations

from typing import Any

import torch

from isoflat.core.errors import UsageError
from isoflat.core.record import Point
from isoflat.core.state import State
from isoflat.geometry.layerwise import stationarity
from isoflat.measures.base import Subject
from isoflat.risk.batches import as_batches
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.losses import as_loss
from isoflat.risk.network import Network, Selector

_PRECISIONS = {torch.float32, torch.float64}


def subject(
    model: Any,
    data: Any,
    loss: Any,
    params: Selector = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Subject:
    """A subject from a user's model, data and loss; nothing is computed yet.

    Args:
        model: a `torch.nn.Module`.
        data: see `risk.batches.as_batches`.
        loss: see `risk.losses.as_loss`.
        params: which tensors; a glob, several, or a predicate.
        dtype: precision of the products, float32 or float64; None for the weights' own (half precision is promoted).
        device: where to compute; None for where the weights are.

    Raises:
        IsoflatError: the model, the data or the loss cannot be measured; the message says why.
    """
    network = Network(model)
    network.check_mode()
    state = network.state(params)
    risk = EmpiricalRisk(network, as_loss(loss), as_batches(data))
    notes = list(risk.loss.notes)
    if state.frozen:
        notes.append(f"held fixed: {_some(state.frozen)}")
    if tied := network.tied():
        notes.append(f"tied, counted once: {_some(tied)}")
    found = {tensor.dtype for tensor in state.parameters.values()}
    precision = _precision(dtype)
    if precision is None:
        precision = torch.float64 if torch.float64 in found else torch.float32
        if low := found - _PRECISIONS:
            notes.append(f"weights in {_some(map(str, low))} were measured in {precision}")
    place = torch.device(device) if device is not None else state.device
    return Subject(risk, state.to(dtype=precision, device=place), tuple(notes))


def point(state: State, survey: Survey) -> Point:
    """Where on the loss surface the state is."""
    return Point(
        loss=survey.loss,
        accuracy=survey.accuracy,
        gradient_norm=float(torch.linalg.vector_norm(survey.gradient)),
        stationarity=stationarity(state, survey.gradient),
        examples=survey.rows,
        targets=survey.count,
        parameters=state.space.size,
        chance=survey.chance,
    )


def warnings(point: Point, survey: Survey) -> tuple[str, ...]:
    """What the survey found that a reader must know."""
    notes = []
    if survey.unused:
        notes.append(f"the loss does not depend on: {_some(survey.unused)} (zero curvature)")
    if point.accuracy is not None and point.chance is not None:
        # Two standard errors of a binomial share: a network that has learned anything lies far above.
        error = (point.chance * (1 - point.chance) / max(point.targets, 1)) ** 0.5
        if point.accuracy <= point.chance + 2 * error:
            notes.append(
                f"accuracy {point.accuracy:.3f} is at chance level ({point.chance:.3f}): untrained weights, the wrong "
                "checkpoint, or inputs preprocessed differently than in training?"
            )
    return tuple(notes)


def _precision(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and resolved not in _PRECISIONS:
        raise UsageError(f"dtype must be float32 or float64 (second derivatives need no less), got {dtype}")
    return resolved


def _some(names: Any) -> str:
    """A few names and how many more."""
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
