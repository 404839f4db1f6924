"""From what a user has to a `Subject`: everything that can be refused is refused here, before any cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from isoflat.core.errors import DataError, NonFinite, UnsupportedModel, UsageError
from isoflat.core.record import Point
from isoflat.core.rng import stream
from isoflat.core.state import State
from isoflat.geometry.layerwise import stationarity
from isoflat.measures.base import Subject
from isoflat.risk.batches import as_batches, move
from isoflat.risk.empirical import EmpiricalRisk, Survey
from isoflat.risk.losses import Loss, TargetLoss, as_loss, call, split
from isoflat.risk.network import Network, Selector
from isoflat.risk.ranks import check_whole
from isoflat.risk.temperature import scaled
from isoflat.risk.wrappers import compiled, unwrapped
from isoflat.symmetry.finding.discover import discover, inputs_of
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry
from isoflat.symmetry.groups.declared import UnitScale

_PRECISIONS = {torch.float32, torch.float64}


def subject(  # noqa: PLR0913
    model: Any,
    data: Any,
    loss: Any,
    params: Selector = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    logits: str | None = None,
    initial: torch.nn.Module | Mapping[str, torch.Tensor] | None = None,
) -> Subject:
    """A subject from a user's model, data and loss; nothing is computed yet.

    Args:
        model: a `torch.nn.Module`.
        data: see `risk.batches.as_batches`.
        loss: see `risk.losses.as_loss`.
        params: which tensors; a glob, several, or a predicate.
        dtype: precision of the products, float32 or float64; None for the weights' own (half precision is promoted).
        device: where to compute; None for where the weights are.
        logits: "normalised" for the loss of scores of length one; None for the loss as it is.
        initial: the weights before training: a network of the same architecture, or its state_dict.

    Raises:
        IsoflatError: the model, the data or the loss cannot be measured; the message says why.
    """
    network, wrappers = _unwrapped(model)
    network.check_mode()
    state = network.state(params)
    risk = EmpiricalRisk(network, _scored(as_loss(loss), logits), as_batches(data))
    notes = [f"measured without its wrapper: {', '.join(wrappers)}"] if wrappers else []
    if compiled(network.module):
        notes.append("compiled parts were run as they are written")
    notes += risk.loss.notes
    if state.frozen:
        notes.append(f"held fixed: {some(state.frozen)}")
    if tied := network.tied():
        notes.append(f"tied, counted once: {some(tied)}")
    found = {tensor.dtype for tensor in state.parameters.values()}
    precision = _precision(dtype)
    if precision is None:
        precision = torch.float64 if torch.float64 in found else torch.float32
        if low := found - _PRECISIONS:
            notes.append(f"weights in {some(map(str, low))} were measured in {precision}")
    place = torch.device(device) if device is not None else state.device
    state = state.to(dtype=precision, device=place)
    before = None if initial is None else _before(initial, network, state)
    return Subject(risk, state, tuple(notes), before)


def _before(initial: torch.nn.Module | Mapping[str, torch.Tensor], network: Network, state: State) -> torch.Tensor:
    """The weights before training, in the order of the state's trainable tensors; the others may be missing."""
    if isinstance(initial, torch.nn.Module):
        module = unwrapped(initial)[0]
        given: Mapping[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    elif isinstance(initial, Mapping):
        given = initial
    else:
        raise UsageError(
            "initial must be the network before training, or its state_dict (kept with copy.deepcopy), got "
            f"{type(initial).__name__}"
        )
    module = network.module
    known = {*module.state_dict(), *state.tensors, *(name for name, _ in module.named_buffers())}
    problems = [f"missing {some(missing)}"] if (missing := state.parameters.keys() - given.keys()) else []
    problems += [f"unknown {some(map(str, further))}"] if (further := given.keys() - known) else []
    for name in (name for name in state.parameters if name in given):
        tensor, shape = given[name], tuple(state.parameters[name].shape)
        came = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        if came != shape:
            problems.append(f"{name} expected in shape {shape}, got {came}")
        elif tensor.is_meta:
            problems.append(f"{name} has no values (meta)")
    if problems:
        raise UsageError(
            f"initial does not fit {type(module).__name__}: {'; '.join(problems)}. Pass the weights before training of "
            "this architecture, by the names of the network itself (without those of wrappers)"
        )
    parts = [given[name].detach().to(state.device, torch.float64).reshape(-1) for name in state.parameters]
    if bad := [name for name, part in zip(state.parameters, parts, strict=True) if not bool(part.isfinite().all())]:
        raise NonFinite(f"initial holds NaN or infinite entries in {some(bad)}: pass the weights before training")
    return torch.cat(parts)


def _scored(loss: Loss, logits: str | None) -> Loss:
    """The loss of the scores as they are, of their directions, or of scores yet to be scaled."""
    if logits is None:
        return loss
    wanted = _wanted(logits)
    if logits != "normalised" and wanted is None:
        raise UsageError(
            "logits must be 'normalised', 'loss=' and a positive number that the loss is brought to, such as 'loss=0.1', or "
            f"None for the loss as it is, got {logits!r}"
        )
    if not isinstance(loss, TargetLoss):
        raise UsageError(
            f"logits='{logits}' needs a loss of output and target, and {type(loss).__name__} sees the model: leave it out"
        )
    return loss.normalised() if wanted is None else loss.at(wanted)


def _wanted(logits: str) -> float | None:
    """The number behind `loss=`, if that is what it says."""
    name, _, number = logits.partition("=")
    try:
        wanted = float(number) if name == "loss" else math.nan
    except ValueError:
        return None
    return wanted if 0 < wanted < math.inf else None


def at_equal_loss(target: Subject) -> Subject:
    """The subject with its scores scaled as `logits="loss=…"` wants them; any other as it is.

    Raises:
        UsageError: no factor brings the loss there.
    """
    loss = target.risk.loss
    if not isinstance(loss, TargetLoss) or loss.wanted is None:
        return target
    risk, note = scaled(target.risk, target.state, loss, loss.wanted)
    return replace(target, risk=risk, notes=(*target.notes, note))


def _unwrapped(model: Any) -> tuple[Network, tuple[str, ...]]:
    """The network inside the wrappers of other tools, and what these were."""
    outer = Network(model)
    inner, wrappers = unwrapped(outer.module)
    check_whole(inner)
    return Network(inner), wrappers


def symmetries_of(subject: Subject, declared: Sequence[Symmetry] = ()) -> Found:
    """The symmetries of a subject's network, found by tracing it on its first batch, and proved there.

    Args:
        subject: what is measured.
        declared: symmetries of the user's own; scalings of units join the group.

    Raises:
        UnsupportedModel: the network cannot be traced.
        SymmetryViolated: what was found changes the output.
    """
    batch = next(iter(subject.risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    module = subject.risk.network.module
    dtype = next(iter(subject.risk.network.state().parameters.values())).dtype
    recorder = _Recorder(module)
    with torch.no_grad():
        subject.risk.loss(recorder, move(batch, _device(module), dtype))
    blind = isinstance(subject.risk.loss, TargetLoss) and _ignores_common_score(
        subject.risk.loss, module, move(batch, _device(module), dtype)
    )
    args, kwargs = recorder.two_rows()
    found = discover(module, args, kwargs, blind, declared=[s for s in declared if isinstance(s, UnitScale)])
    found.verify()
    return found


def outputs(risk: EmpiricalRisk) -> Callable[[State], torch.Tensor]:
    """The network's output on the first batch, as a function of the state."""
    inputs, _ = split(next(iter(risk.batches)))

    def output(state: State) -> torch.Tensor:
        moved = move(inputs, state.device, state.dtype)
        with torch.no_grad():
            return risk.network(state, lambda model: call(model, moved))

    return output


class _Recorder:
    """Stands for the model while a loss is evaluated, and keeps what the model was called with."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._call is not None:
            raise UnsupportedModel(
                "the loss calls the model several times per batch, so that its symmetries cannot be told from one trace; "
                "geometry='layerwise' needs none"
            )
        self._call = (args, kwargs)
        return self._module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def two_rows(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's inputs, cut to two rows."""
        if self._call is None:
            raise UnsupportedModel("the loss never calls the model: what it measures is not this network's function")
        args, kwargs = self._call
        both = inputs_of((*args, *kwargs.values()))[0]
        return both[: len(args)], dict(zip(kwargs, both[len(args) :], strict=True))


def _ignores_common_score(loss: TargetLoss, module: torch.nn.Module, batch: Any) -> bool:
    """Whether adding a constant to all scores of an example leaves the loss alone, on the real targets."""
    inputs, target = split(batch)
    with torch.no_grad():
        scores = call(module, inputs).double()
        if scores.ndim < 2 or (target.is_floating_point() and target.shape == scores.shape[:1]):
            return False
        target = target.double() if target.is_floating_point() else target
        shifts = torch.randn(scores.shape[0], 1, *scores.shape[2:], generator=stream(0, "scores"), dtype=torch.float64)
        shifts = shifts.to(scores.device)
        before, after = loss.summed(scores, target), loss.summed(scores + shifts, target)
        size = float(before.abs() + scores.abs().sum())
    return abs(float(before - after)) <= 1e-12 * size


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


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
        notes.append(f"the loss does not depend on: {some(survey.unused)} (zero curvature)")
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
    if resolved is torch.bfloat16:  # inside products only
        return torch.float32
    if dtype is not None and resolved not in _PRECISIONS:
        raise UsageError(f"dtype must be float32 or float64 (second derivatives need no less), got {dtype}")
    return resolved


def some(names: Any) -> str:
    """A few names and how many more."""
    listed = sorted(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")
