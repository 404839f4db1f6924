"""A measurement that several processes share: what they must agree on before any cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from isoflat.core.errors import DataError, UsageError
from isoflat.core.fingerprint import fingerprint
from isoflat.core.state import State
from isoflat.geometry.base import Geometry
from isoflat.measures.base import Budget, Effort, Measure, Subject
from isoflat.risk.batches import digest
from isoflat.risk.ranks import Ranks

Plan = Sequence[tuple[Measure, Geometry]]


def agreed(ranks: Ranks, prepare: Callable[[], Subject], effort: Effort, plan: Plan) -> Subject:
    """The subject, prepared on every rank, and found to be the same on all.

    Args:
        ranks: who shares the measurement.
        prepare: the subject as each process was given it.
        effort: how hard.
        plan: what is measured.

    Raises:
        RanksDiffer: network, weights, data or settings differ; raised on all ranks.
        UsageError: the effort has a limit that the ranks cannot keep in step.
        IsoflatError: one of the ranks cannot prepare its subject; raised on all.
    """
    if ranks.world == 1:
        target = prepare()
        return replace(target, risk=replace(target.risk, ranks=ranks))

    def work() -> Subject:
        if effort.budget.seconds is not None:
            raise UsageError(
                "a budget of seconds ends a measurement by the clock, and several processes have several clocks: limit "
                "the number of products instead"
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

    return ranks.together(work, lambda target: _facts(target, effort, plan))


def _facts(target: Subject, effort: Effort, plan: Plan) -> Mapping[str, str]:
    """What must be the same, by name; weights and data as hashes."""
    risk, state = target.risk, target.state
    settings = {field.name: str(getattr(effort, field.name)) for field in fields(Effort) if field.name != "budget"}
    limits = {f"budget's {field.name}": str(getattr(effort.budget, field.name)) for field in fields(Budget)}
    modules = [f"{name} {type(part).__qualname__}" for name, part in risk.network.module.named_modules()]
    return {
        "measures": "; ".join(f"{measure.label} in {geometry.name}" for measure, geometry in plan),
        **settings,
        **limits,
        "precision": str(state.dtype),
        "kind of device": state.device.type,
        "loss": f"{risk.loss.label}, {'mean' if risk.loss.averages else 'sum'}, logits {risk.loss.logits}",
        "modules": fingerprint(*modules),
        "names of parameters in order": fingerprint(*state.parameters, "", *state.frozen),
        **{f"'{name}'": _hash(state, name) for name in state.tensors},
        "initial weights": "none" if target.initial is None else State({"initial": target.initial}).fingerprint(),
        "number of batches": str(len(risk.batches.digests or ())),
        "data": fingerprint(*(risk.batches.digests or ())),
    }


def _hash(state: State, name: str) -> str:
    return State({name: state.tensors[name]}).fingerprint()
