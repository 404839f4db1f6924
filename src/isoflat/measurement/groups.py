"""Symmetries of the network that is measured: found by tracing it, or claimed by the user and verified; then given to geometries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from isoflat.core.errors import DataError, SymmetryViolated, UnsupportedModel, UsageError
from isoflat.core.rng import stream
from isoflat.geometry.traced import Traced
from isoflat.measurement.counted import counted
from isoflat.measurement.subject import Plan, Subject
from isoflat.measures.settings import Settings
from isoflat.risk.batches import alone, move
from isoflat.risk.empirical import EmpiricalRisk, leaf_state
from isoflat.risk.habits import learned
from isoflat.risk.losses import TargetLoss, split
from isoflat.risk.outputs import mapped
from isoflat.symmetry.finding.caches import traceable
from isoflat.symmetry.finding.discover import discover, searching
from isoflat.symmetry.finding.rows import on_few_rows
from isoflat.symmetry.found import Counted, Found
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
    found = symmetries_of(target, declared) if known is None else _on_every_batch(known, target.risk)
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
    risk = subject.risk
    batch = next(iter(risk.batches), None)
    if batch is None:
        raise DataError("the data is empty: the loader gave no batch")
    if risk.network.habits is None:
        risk = learned(risk, subject.state)
    network, seen = risk.network, _look(risk, batch)
    units = [s for s in declared if isinstance(s, UnitScale)]

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Found:
        rows = _first_rows(seen, (*args, *kwargs.values()))
        return discover(network.module, args, kwargs, blind, declared=units, counted=rows)

    caches = () if network.habits is None else network.habits.caches
    with searching(network.module), traceable(network.module, caches):
        with network.following(network.state().to(dtype=torch.float64)):
            blind = isinstance(risk.loss, TargetLoss) and _ignores_common_score(risk.loss, seen.output, seen.batch)
        found = on_few_rows(*seen.inputs, find)
    found = _on_every_batch(found, risk)
    found.verify()
    return found


def _on_every_batch(found: Found, risk: EmpiricalRisk) -> Found:
    """The symmetries without those that hold only where attention leaves every row a key, unless all batches do."""
    averages = found.constraints.averages
    if not averages:
        return found
    if not found.averages_hold(found.args, found.kwargs, found.counted):
        return found.without_averages()
    always = any(average.varies for average in averages)
    traced = _shapes(found.args, found.kwargs)
    for batch in risk.batches:
        seen = _look(risk, batch)
        if (always or _shapes(*seen.inputs) != traced) and not found.averages_hold(*seen.inputs, seen.counted):
            return found.without_averages()
    return found


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Size | None]:
    """Shapes of all inputs but for their rows."""
    return [value.shape[1:] if isinstance(value, Tensor) else None for value in (*args, *kwargs.values())]


@final
@dataclass(frozen=True)
class _SeenCall:
    """The network as a loss calls it on a batch.

    Attributes:
        inputs: positional and keyword inputs.
        output: what it gave.
        counted: entries of it that the loss looks at; None for all.
        batch: the batch, where the network is.
    """

    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    counted: Counted | None
    batch: Any


def _first_rows(seen: _SeenCall, inputs: tuple[Any, ...]) -> Counted | None:
    """Entries of the output that the loss looks at, for inputs that are cut to their first rows."""
    if seen.counted is None:
        return None
    before, now = (
        next((len(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.ndim), 0)
        for values in ((*seen.inputs[0], *seen.inputs[1].values()), inputs)
    )
    place, mask = seen.counted
    return (place, mask[:now]) if len(mask) == before else None


def _look(risk: EmpiricalRisk, batch: Any) -> _SeenCall:
    """Evaluate the loss of a batch once, and see how it calls the network; nothing that this writes is the user's."""
    state = risk.network.state()
    moved = move(alone(batch), state.device, state.dtype)

    def use(model: torch.nn.Module) -> _SeenCall:
        recorder = _Recorder(model)
        risk.loss(recorder, moved)
        inputs, output = recorder.call()
        return _SeenCall(inputs, output, counted(risk.loss, model, output, moved), moved)

    return replace(risk.network, inside=None)(leaf_state(state), use)


def _verify(target: Subject, symmetries: Sequence[Symmetry], seed: int) -> None:
    """Prove the user's own symmetries on the first batch."""
    output = target.risk.outputs()
    for symmetry in symmetries:
        missing = symmetry.touches - set(target.state.tensors)
        if missing:
            raise SymmetryViolated(f"{symmetry} names tensors the model does not have: {', '.join(sorted(missing))}")
        verify(symmetry, output, target.state, stream(seed, "verify", symmetry.label))


class _Recorder:
    """Stands for the model while a loss is evaluated, and keeps what the model was called with and what it gave."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._seen: tuple[tuple[tuple[Any, ...], dict[str, Any]], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._seen is not None:
            raise UnsupportedModel(
                "the loss calls the model several times per batch, so that its symmetries cannot be told from one trace; "
                "geometry='layerwise' needs none"
            )
        output = self._module(*args, **kwargs)
        self._seen = ((args, kwargs), output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def call(self) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Any]:
        """The call's inputs and output."""
        if self._seen is None:
            raise UnsupportedModel("the loss never calls the model: what it measures is not this network's function")
        return self._seen


def _ignores_common_score(loss: TargetLoss, output: Any, batch: Any) -> bool:
    """Test whether adding a constant to all scores of an example leaves the loss alone, on the real targets."""
    target = split(batch)[1]
    with torch.no_grad():
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
        # Classes that are switched off have scores of minus infinity, which say nothing about the size of the others.
        size = float(before.abs() + scores.masked_fill(~scores.isfinite(), 0.0).abs().sum())
    return math.isfinite(size) and abs(float(before - after)) <= 1e-12 * size
