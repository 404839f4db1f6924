"""`Subject`: a network, its data and its loss, made ready. What can be refused about them is refused here, before any cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, final

import torch
from torch import Tensor

from isoflat.core.errors import DataError, NonFinite, UsageError
from isoflat.core.render import some
from isoflat.core.state import State, fingerprint
from isoflat.geometry.base import Geometry
from isoflat.measures.base import Measure
from isoflat.measures.settings import Budget, Settings
from isoflat.risk.arguments import held_in_loss
from isoflat.risk.batches import digest
from isoflat.risk.division import settled, told
from isoflat.risk.empirical import EmpiricalRisk
from isoflat.risk.forms import batches_of
from isoflat.risk.losses import Loss, TargetLoss, as_loss
from isoflat.risk.network import Network, compiled, unwrapped
from isoflat.risk.ranks import Ranks, check_whole
from isoflat.risk.temperature import scaled

Plan = Sequence[tuple[Measure, Geometry]]
"""Measures, each with the geometry it is measured in."""


@final
@dataclass(frozen=True)
class Subject:
    """Subject of a measurement: an empirical risk at some weights.

    Attributes:
        risk: the empirical risk.
        state: the weights, in the precision of the products.
        notes: remarks on how it was prepared, for the reader of a record.
        initial: the trainable tensors before training, shape `(n,)`, float64; None where they are not known.
    """

    risk: EmpiricalRisk
    state: State
    notes: tuple[str, ...] = ()
    initial: Tensor | None = None


_PRECISIONS = {torch.float32, torch.float64}

_NUMERIC = ("rtol", "confidence", "certify", "probes", "seed", "check", "inside", "sample")
"""Settings on which numbers depend: they must be the same in every process."""


def subject(model: Any, data: Any, loss: Any, settings: Settings = Settings()) -> Subject:  # noqa: B008
    """A subject from a user's model, data and loss; nothing is computed yet.

    Args:
        model: a `torch.nn.Module`.
        data: see `risk.batches.as_batches`.
        loss: see `risk.losses.as_loss`.
        settings: the settings, of which `params`, `dtype`, `device`, `logits` and `initial` are used.

    Raises:
        IsoflatError: the model, the data or the loss cannot be measured; the message says why.
    """
    params, dtype, device = settings.params, settings.dtype, settings.device
    inner, wrappers = unwrapped(Network(model).module)
    check_whole(inner)
    network = Network(inner)
    network.check_mode()
    state = network.state(params)
    known = as_loss(loss)
    risk = EmpiricalRisk(network, _scored(known, settings.logits), batches_of(data, known))
    notes = [f"measured without its wrapper: {', '.join(wrappers)}"] if wrappers else []
    if compiled(network.module):
        notes.append("compiled parts were run as they are written")
    notes += [*risk.loss.notes, *held_in_loss(loss, network.module), *risk.batches.notes]
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
    before = None if settings.initial is None else _before(settings.initial, network, state)
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
    """The loss as it is, of normalised scores, or of scores that `at_equal_loss` is to scale."""
    if logits is None:
        return loss
    wanted = _loss_named(logits)
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


def _loss_named(logits: str) -> float | None:
    """The loss x of the setting `loss=x`; None for other texts."""
    name, _, number = logits.partition("=")
    try:
        named = float(number) if name == "loss" else math.nan
    except ValueError:
        return None
    return named if 0 < named < math.inf else None


def divided(target: Subject) -> Subject:
    """The subject with what a few of its rows tell about cutting batches, and weighing them.

    Raises:
        UsageError: it is not known how to weigh several batches.
        DataError: the data comes in batches of a size that would decide about the number.
    """
    risk = settled(target.risk, target.state)
    return replace(target, risk=risk, notes=tuple(told(target.notes, target.risk.loss, risk.loss)))


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


def agreed(ranks: Ranks, prepare: Callable[[], Subject], settings: Settings, plan: Plan) -> Subject:
    """The subject, prepared on every rank, and found to be the same on all.

    Args:
        ranks: processes that share the measurement.
        prepare: makes the subject as this process was given it.
        settings: the settings of the measurement.
        plan: measures, each with the geometry it is measured in.

    Raises:
        RanksDiffer: network, weights, data or settings differ; raised on all ranks.
        UsageError: the settings have a limit that the ranks cannot keep in step.
        IsoflatError: one of the ranks cannot prepare its subject; raised on all.
    """
    if ranks.world == 1:
        target = prepare()
        return replace(target, risk=replace(target.risk, ranks=ranks))
    with ranks.agreeing() as facts:
        target = _among(ranks, prepare, settings)
        facts |= _facts(target, settings, plan)
    return target


def _among(ranks: Ranks, prepare: Callable[[], Subject], settings: Settings) -> Subject:
    """The subject with its batches dealt out to several processes."""
    if settings.budget.seconds is not None:
        raise UsageError(
            "a budget of seconds ends a measurement by the clock, and several processes have several clocks: limit the "
            "number of products instead"
        )
    target = prepare()
    batches = target.risk.batches if ranks.ordered else target.risk.batches.among(ranks.world)
    digests = [digest(batch) for batch in batches]
    if not digests:
        raise DataError("the data is empty: the loader gave no batch")
    note = f"{ranks.world - len(digests)} of {ranks.world} processes had no batch: give the data in smaller ones"
    return replace(
        target,
        risk=replace(target.risk, batches=batches.pinned(digests), ranks=ranks),
        notes=(*target.notes, note) if len(digests) < ranks.world else target.notes,
    )


def _facts(target: Subject, settings: Settings, plan: Plan) -> Mapping[str, str]:
    """Facts that must be the same on all processes, by name; weights and data as hashes."""
    risk, state = target.risk, target.state
    asked = {name: str(getattr(settings, name)) for name in _NUMERIC}
    limits = {f"budget's {field.name}": str(getattr(settings.budget, field.name)) for field in fields(Budget)}
    modules = [f"{name} {type(part).__qualname__}" for name, part in risk.network.module.named_modules()]
    return {
        "measures": "; ".join(f"{measure.label} in {geometry.name}" for measure, geometry in plan),
        **asked,
        **limits,
        "precision": str(state.dtype),
        "kind of device": state.device.type,
        "loss": f"{risk.loss.label}, {'mean' if risk.loss.averages else 'sum'}, logits {risk.loss.logits}",
        "modules": fingerprint(*modules),
        "names of parameters in order": fingerprint(*state.parameters, "", *state.frozen),
        **{f"'{name}'": State({name: tensor}).fingerprint() for name, tensor in state.tensors.items()},
        "initial weights": "none" if target.initial is None else State({"initial": target.initial}).fingerprint(),
        "number of batches": str(len(risk.batches.digests or ())),
        "data": fingerprint(*(risk.batches.digests or ())),
    }


def _precision(dtype: torch.dtype | str | None) -> torch.dtype | None:
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved is torch.bfloat16:  # inside products only
        return torch.float32
    if dtype is not None and resolved not in _PRECISIONS:
        raise UsageError(f"dtype must be float32 or float64 (second derivatives need no less), got {dtype}")
    return resolved
