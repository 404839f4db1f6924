"""Symmetries of the network that is measured: found by tracing it, or claimed by the user and verified; then given to geometries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isoflat.core.errors import DataError, SymmetryViolated, UnsupportedModel, UsageError
from isoflat.core.rng import stream
from isoflat.geometry.traced import Traced
from isoflat.measurement.subject import Plan, Subject
from isoflat.measures.settings import Settings
from isoflat.risk.batches import move
from isoflat.risk.losses import TargetLoss, call, split
from isoflat.risk.outputs import mapped
from isoflat.symmetry.finding.discover import discover, inputs_of
from isoflat.symmetry.found import Found
from isoflat.symmetry.groups.base import Symmetry, verify
from isoflat.symmetry.groups.declared import UnitScale


def with_groups(plan: Plan, target: Subject, settings: Settings) -> Plan:
    """The plan, in which every geometry that needs the network's symmetries knows them; all are proved first.

    Args:
        plan: measures, each with the geometry it is measured in.
        target: the subject of the measurement.
        settings: the settings, of which `symmetries` and `seed` are used.

    Raises:
        SymmetryViolated: a symmetry that the user claims changes the output, or one that was found does.
        UsageError: symmetries were found on another network.
        UnsupportedModel: the network cannot be traced.
    """
    known = settings.symmetries if isinstance(settings.symmetries, Found) else None
    declared: Sequence[Symmetry] = () if known is not None else tuple(settings.symmetries or ())  # pyrefly: ignore
    if declared:
        _verify(target, declared, settings.seed)
    if not any(isinstance(geometry, Traced) and geometry.found is None for _, geometry in plan):
        return plan
    if known is not None:
        if known.model is not target.risk.network.module:
            raise UsageError("these symmetries were found on another network: call isoflat.symmetries on this one")
        known.verify()
    found = known or symmetries_of(target, declared)
    return tuple(
        (measure, place.on(found) if isinstance(place, Traced) and place.found is None else place)
        for measure, place in plan
    )


def hashes(plan: Plan) -> dict[str, str]:
    """The group of each geometry that knows the network's symmetries, by name."""
    found = {place.name: place.found for _, place in plan if isinstance(place, Traced)}
    return {f"group of {name}": group.hash for name, group in found.items() if group is not None}


def symmetries_of(subject: Subject, declared: Sequence[Symmetry] = ()) -> Found:
    """The symmetries of a subject's network, found by tracing it on its first batch, and proved there.

    Args:
        subject: the subject of a measurement.
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
    moved = move(batch, next(module.parameters()).device, dtype)
    recorder, loss = _Recorder(module), subject.risk.loss
    with torch.no_grad():
        loss(recorder, moved)
    blind = isinstance(loss, TargetLoss) and _ignores_common_score(loss, module, moved)
    args, kwargs = recorder.two_rows()
    found = discover(module, args, kwargs, blind, declared=[s for s in declared if isinstance(s, UnitScale)])
    found.verify()
    return found


def _verify(target: Subject, symmetries: Sequence[Symmetry], seed: int) -> None:
    """Prove the user's own symmetries on the first batch."""
    output = target.risk.outputs()
    for symmetry in symmetries:
        missing = symmetry.touches - set(target.state.tensors)
        if missing:
            raise SymmetryViolated(f"{symmetry} names tensors the model does not have: {', '.join(sorted(missing))}")
        verify(symmetry, output, target.state, stream(seed, "verify", symmetry.label))


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
    """Test whether adding a constant to all scores of an example leaves the loss alone, on the real targets."""
    inputs, target = split(batch)
    with torch.no_grad():
        output = call(module, inputs, whole=loss.whole)
        loss, found = loss.packed(output, target)
        if found is not output and found is not getattr(output, "logits", None):
            return False
        scores = found.double()
        floating = isinstance(target, Tensor) and target.is_floating_point()
        if scores.ndim < 2 or (floating and target.shape == scores.shape[:1]):
            return False
        target = mapped(target, lambda part: part.double() if part.is_floating_point() else part)
        shifts = torch.randn(scores.shape[0], 1, *scores.shape[2:], generator=stream(0, "scores"), dtype=torch.float64)
        shifts = shifts.to(scores.device)
        before, after = loss.summed(scores, target), loss.summed(scores + shifts, target)
        size = float(before.abs() + scores.abs().sum())
    return abs(float(before - after)) <= 1e-12 * size
